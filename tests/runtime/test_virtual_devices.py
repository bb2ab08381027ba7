"""Setting virtual GPUs up, again and again, and what the rest of the world is told about them."""

import subprocess
import sys
import types

import pytest
import torch

from runtime.virtual import VirtualGpuUnavailableError, adapter, virtual_gpus

GIB = 2**30


def test_set_up_gives_devices_with_their_capacities():
    gpus = virtual_gpus([GIB, 2 * GIB, 512])
    assert gpus.devices == (torch.device("vgpu:0"), torch.device("vgpu:1"), torch.device("vgpu:2"))
    assert gpus.num_devices == 3 == torch.vgpu.device_count()
    assert [gpus.ledger.capacity_bytes(index) for index in range(3)] == [GIB, 2 * GIB, 512]


def test_nobody_takes_them_for_real_ones():
    gpus = virtual_gpus([GIB, 512])
    held = torch.zeros(100, device="vgpu:0")
    assert repr(gpus) == "<2 virtual GPU(s) of 1.00 GiB, 512 bytes>"
    assert gpus.describe().splitlines() == [
        "2 virtual GPUs: computations run on the CPU, only placement and memory are modelled",
        "vgpu:0: 512 bytes alive, peak 512 bytes, capacity 1.00 GiB",
        "vgpu:1: 0 bytes alive, peak 0 bytes, capacity 512 bytes",
    ]
    assert not held.is_cuda
    assert held.is_vgpu


ABSENT = {
    "factory": lambda: torch.empty(1, device="vgpu:2"),
    "tensor": lambda: torch.tensor([1.0], device="vgpu:2"),
    "to": lambda: torch.ones(1).to("vgpu:2"),
    "between": lambda: torch.ones(1, device="vgpu:0").to("vgpu:2"),
    "module": lambda: torch.nn.Linear(1, 1).to("vgpu:2"),
    "memory": lambda: torch.vgpu.mem_get_info(2),
}


@pytest.mark.parametrize("call", ABSENT.values(), ids=ABSENT)
def test_absent_device_is_refused_with_the_number_there_is(call):
    virtual_gpus([GIB, GIB])
    message = "vgpu error: invalid device ordinal: vgpu:2 does not exist, this process has 2 virtual GPUs"
    with pytest.raises(RuntimeError, match=message):
        call()


def test_new_set_replaces_an_unused_one():
    virtual_gpus([GIB] * 4)
    assert torch.ones(1, device="vgpu:3").item() == 1
    virtual_gpus([512])
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(513, dtype=torch.uint8, device="vgpu:0")
    with pytest.raises(RuntimeError, match="has 1 virtual GPUs"):
        torch.empty(1, device="vgpu:3")


def test_new_set_is_refused_while_tensors_live_on_the_old():
    gpus = virtual_gpus([GIB, GIB])
    held = torch.zeros(1000, device="vgpu:1")
    message = "tensors are still alive on the virtual GPUs made before: vgpu:1 4,096 bytes; delete them first"
    with pytest.raises(RuntimeError, match=message):
        virtual_gpus([GIB])
    assert (held.sum().item(), gpus.ledger.allocated_bytes(1)) == (0, 4096)


def test_new_set_waits_for_no_garbage():
    virtual_gpus([GIB])
    cycle = [torch.zeros(10, device="vgpu:0")]
    cycle.append(cycle)
    del cycle
    assert virtual_gpus([GIB]).ledger.allocated_bytes(0) == 0


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ([], "expected 1 to 128 capacities, got 0"),
        ([GIB] * 129, "got 129"),
        ([GIB, 0], r"positive .* \[1073741824, 0\]"),
    ],
    ids=["none", "more than an int8 counts", "zero"],
)
def test_impossible_set_is_refused(capacities, message):
    with pytest.raises(ValueError, match=message):
        virtual_gpus(capacities)


def test_last_of_the_most_devices_works():
    virtual_gpus([GIB] * 128)
    tensor = torch.ones(2, device="vgpu:127")
    assert ((tensor + 1).device, (tensor + 1).tolist()) == (torch.device("vgpu:127"), [2.0, 2.0])


def test_device_module_answers_as_torch_cuda_does():
    virtual_gpus([GIB, GIB])
    held = torch.zeros(1000, device="vgpu:1")
    assert torch.vgpu.is_available()
    assert torch.vgpu.current_device() == 0
    assert torch.vgpu.mem_get_info(1) == (GIB - 4096, GIB) == torch.vgpu.mem_get_info("vgpu:1")
    assert torch.vgpu.memory_allocated(held.device) == 4096
    assert torch.vgpu.memory_allocated() == 0
    del held
    assert torch.vgpu.max_memory_allocated(1) == 4096
    torch.vgpu.reset_peak_memory_stats()
    assert torch.vgpu.max_memory_allocated(1) == 0
    torch.vgpu.synchronize()
    torch.vgpu.empty_cache()


def test_seed_of_torch_decides_random_numbers_there():
    virtual_gpus([GIB])
    torch.manual_seed(5)
    state = torch.vgpu.get_rng_state()
    first = torch.rand(3, device="vgpu:0").tolist()
    torch.vgpu.set_rng_state(state)
    assert torch.rand(3).tolist() == first


def test_autocast_can_be_switched_off_there():
    virtual_gpus([GIB])
    with torch.autocast("vgpu", enabled=False):
        assert torch.ones(1, device="vgpu:0").dtype == torch.float32


def test_torch_without_python_backends_is_named():
    old_torch = types.ModuleType("backend_registration")
    with pytest.raises(VirtualGpuUnavailableError, match=r"lacks .*_setup_privateuseone_for_python_backend"):
        adapter.backend_setup(old_torch)


def run_python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)


def test_process_of_another_backend_is_refused():
    done = run_python(
        "import torch\n"
        "torch.utils.rename_privateuse1_backend('npu')\n"
        "from runtime.virtual import VirtualGpuUnavailableError, virtual_gpus\n"
        "try:\n"
        "    virtual_gpus([512])\n"
        "except VirtualGpuUnavailableError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "the backend 'npu' owns it in this process: run them in a child process" in done.stdout


def test_fresh_process_sets_up_without_a_warning_and_exits_clean():
    done = run_python(
        "import sys, runtime\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "from runtime.virtual import virtual_gpus\n"
        "assert not hasattr(torch, 'vgpu')\n"
        "gpus = virtual_gpus([2**20])\n"
        "held = torch.nn.Linear(4, 4).to('vgpu:0')\n"
        "print(held(torch.ones(1, 4, device='vgpu:0')).device)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "vgpu:0\n", "")
