"""The ledger: every byte alive on a virtual GPU is counted once, and no longer than it lives."""

import copy
import gc
import threading

import pytest
import torch

from runtime.virtual import MemoryLedger, virtual_gpus
from runtime.virtual.rules import DeviceMismatchError
from runtime.virtual.tensors import published

BLOCK = 512
MIB = 2**20


@pytest.fixture
def ledger():
    """Counts on two devices of one MiB, nothing alive yet."""
    return virtual_gpus([MIB, MIB]).ledger


def test_allocation_counts_whole_blocks_while_it_lives():
    counted = MemoryLedger([4 * BLOCK])
    first, second = counted.allocate(0, 1), counted.allocate(0, BLOCK + 1)
    assert (first.num_bytes, second.num_bytes, counted.allocated_bytes(0)) == (BLOCK, 2 * BLOCK, 3 * BLOCK)
    del first
    assert (counted.allocated_bytes(0), counted.free_bytes(0), counted.peak_bytes(0)) == (1024, 1024, 1536)
    del second
    third = counted.allocate(0, 1)
    assert (counted.allocated_bytes(0), counted.peak_bytes(0)) == (third.num_bytes, 1536)


def test_last_block_fits_and_one_byte_more_does_not():
    counted = MemoryLedger([2 * BLOCK])
    whole = counted.allocate(0, 2 * BLOCK)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"Tried to allocate 1 bytes\. vgpu:0 has a total capacity of 1\.00 KiB"
    ):
        counted.allocate(0, 1)
    assert counted.allocated_bytes(0) == whole.num_bytes == counted.peak_bytes(0)


def test_threads_leave_nothing_behind():
    counted = MemoryLedger([MIB])

    def work():
        for _ in range(2000):
            counted.allocate(0, 100)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.allocated_bytes(0) == 0
    assert BLOCK <= counted.peak_bytes(0) <= 4 * BLOCK


def test_tensor_counts_on_its_own_device_only(ledger):
    tensor = torch.empty(1000, dtype=torch.bfloat16, device="vgpu:1")
    assert (ledger.allocated_bytes(0), ledger.allocated_bytes(1)) == (0, 2048)
    assert tensor.nbytes == 2000


VIEWS = {
    "slice": lambda t: t[2:5],
    "view": lambda t: t.view(32, 32),
    "transpose": lambda t: t.view(32, 32).t(),
    "expand": lambda t: t[:, None].expand(1024, 7),
    "detach": lambda t: t.detach(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "chunk": lambda t: t.chunk(4),
    "other dtype": lambda t: t.view(torch.int16),
    "narrow of reshape": lambda t: t.reshape(4, 256).narrow(0, 1, 2),
    "unfold": lambda t: t.unfold(0, 8, 2),
    "already there": lambda t: t.to("vgpu:0"),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_view_shares_bytes_and_keeps_them_alive(view, ledger):
    tensor = torch.zeros(1024, device="vgpu:0")
    seen = view(tensor)
    assert ledger.allocated_bytes(0) == 4096
    del tensor
    gc.collect()
    assert ledger.allocated_bytes(0) == 4096
    del seen
    assert ledger.allocated_bytes(0) == 0


WRITES = {
    "in place": lambda t, u: t.add_(u).mul_(2).clamp_(0, 1),
    "out": lambda t, u: torch.add(t, u, out=t),
    "set items": lambda t, u: t.__setitem__(slice(0, 10), u[10:20]),
    "index_put": lambda t, u: t.__setitem__(torch.tensor([1, 2]), 3.0),
    "masked_fill": lambda t, u: t.masked_fill_(torch.ones(1024, dtype=torch.bool, device="vgpu:0"), 1.0),
    "copy": lambda t, u: t.copy_(u),
    "copy from the other device": lambda t, u: t.copy_(u.to("vgpu:1")),
    "zero": lambda t, u: t.zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_into_a_tensor_allocates_nothing_lasting(write, ledger):
    tensor, other = torch.zeros(1024, device="vgpu:0"), torch.ones(1024, device="vgpu:0")
    write(tensor, other)
    assert (ledger.allocated_bytes(0), ledger.allocated_bytes(1)) == (8192, 0)


def test_result_is_counted_beside_its_operands_at_the_peak(ledger):
    tensor = torch.zeros(1024, device="vgpu:0")
    ledger.reset_peak()
    tensor = tensor + 1
    assert (ledger.allocated_bytes(0), ledger.peak_bytes(0)) == (4096, 8192)
    ledger.reset_peak()
    assert ledger.peak_bytes(0) == 4096


def test_several_results_of_one_operation_count_each(ledger):
    values, indices = torch.zeros(256, device="vgpu:0").sort()
    assert (values.nbytes, indices.nbytes, ledger.allocated_bytes(0)) == (1024, 2048, 3072)


def test_empty_out_argument_takes_the_result(ledger):
    out = torch.empty(0, device="vgpu:0")
    torch.add(torch.ones(256, device="vgpu:0"), 1, out=out)
    assert (out.shape, ledger.allocated_bytes(0)) == ((256,), 1024)


def test_resize_counts_the_larger_storage_and_keeps_elements(ledger):
    tensor = torch.arange(128, dtype=torch.float32, device="vgpu:0")
    tensor.resize_(4, 64)
    assert ledger.allocated_bytes(0) == 1024
    assert tensor.flatten()[:128].tolist() == list(range(128))
    tensor.resize_(2)
    assert (ledger.allocated_bytes(0), tensor.tolist()) == (1024, [0.0, 1.0])


def test_assigning_data_releases_what_was_there(ledger):
    parameter = torch.nn.Parameter(torch.zeros(1024, device="vgpu:0"))
    parameter.data = torch.zeros(256, device="vgpu:0")
    assert ledger.allocated_bytes(0) == 1024


def test_module_counts_parameters_and_buffers_until_it_dies(ledger):
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32)).to("vgpu:0")
    expected = 4096 + 5 * BLOCK + BLOCK  # weight; bias and four vectors of the norm; its counter
    assert ledger.allocated_bytes(0) == expected
    twin = copy.deepcopy(module)
    assert ledger.allocated_bytes(0) == 2 * expected
    module.to("vgpu:1")
    assert (ledger.allocated_bytes(0), ledger.allocated_bytes(1)) == (expected, expected)
    del module, twin
    gc.collect()
    assert (ledger.allocated_bytes(0), ledger.allocated_bytes(1)) == (0, 0)


def test_tied_parameters_count_once(ledger):
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(32, 32, bias=False), "b": torch.nn.Linear(32, 32, bias=False)})
    module["b"].weight = module["a"].weight
    module.to("vgpu:0")
    assert ledger.allocated_bytes(0) == 4096
    assert module["a"].weight is module["b"].weight


def test_cyclic_garbage_is_released_by_the_collector(ledger):
    holder = {"tensor": torch.zeros(1024, device="vgpu:0")}
    holder["self"] = holder
    del holder
    gc.collect()
    assert ledger.allocated_bytes(0) == 0


def test_part_of_a_host_storage_counts_as_the_whole(ledger):
    """As when a kernel returns a slice of what it allocated."""
    tensor = published(torch.arange(1000.0)[10:12], 0)
    assert (tensor.tolist(), tensor.storage_offset(), ledger.allocated_bytes(0)) == ([10.0, 11.0], 10, 4096)


def test_failed_operation_changes_nothing(ledger):
    left, right = torch.zeros(4, 8, device="vgpu:0"), torch.zeros(4, 8, device="vgpu:1")
    for call in (lambda: left + right, lambda: left @ left, lambda: left.view(5, 5), lambda: torch.cat([left, right])):
        with pytest.raises(RuntimeError):
            call()
    assert (ledger.allocated_bytes(0), ledger.allocated_bytes(1)) == (BLOCK, BLOCK)
    assert (ledger.peak_bytes(0), ledger.peak_bytes(1)) == (BLOCK, BLOCK)


def test_full_device_refuses_and_goes_on(ledger):
    held = torch.empty(3 * MIB // 4, dtype=torch.uint8, device="vgpu:1")
    message = (
        r"^vgpu out of memory\. Tried to allocate 512\.00 KiB\. vgpu:1 has a total capacity of 1\.00 MiB of which "
        r"256\.00 KiB is free\."
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        torch.empty(MIB // 2, dtype=torch.uint8, device="vgpu:1")
    assert (ledger.allocated_bytes(1), ledger.peak_bytes(1)) == (held.nbytes, held.nbytes)
    del held
    assert torch.ones(MIB, dtype=torch.uint8, device="vgpu:1").cpu().sum() == MIB


REFUSED_RESULTS = {
    "sum of two": lambda t: t + t,
    "wider dtype": lambda t: t.to(torch.float64),
    "copy from the other device": lambda t: t.to("vgpu:1").to("vgpu:0"),
    "second of two results": lambda t: t[: MIB // 8].sort(),
}


@pytest.mark.parametrize("call", REFUSED_RESULTS.values(), ids=REFUSED_RESULTS)
def test_result_without_room_is_refused_and_leaves_no_bytes(call, ledger):
    tensor = torch.zeros(5 * MIB // 8 // 4, device="vgpu:0")
    with pytest.raises(torch.OutOfMemoryError, match="vgpu:0 has a total capacity"):
        call(tensor)
    gc.collect()
    assert (ledger.allocated_bytes(0), ledger.allocated_bytes(1)) == (tensor.nbytes, 0)


def test_far_too_large_factory_takes_no_host_memory(ledger):
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 4194304\.00 GiB"):
        torch.zeros(2**50, device="vgpu:0")


def test_attention_allocates_its_output_only(ledger):
    query = torch.zeros(1, 2, 256, 8, device="vgpu:0")
    ledger.reset_peak()
    before = ledger.allocated_bytes(0)
    torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert ledger.peak_bytes(0) - before == query.nbytes


def test_attention_under_gradients_keeps_its_operands_no_longer_than_they_live(ledger):
    query = torch.zeros(1, 2, 16, 8, device="vgpu:0", requires_grad=True)
    output = torch.nn.functional.scaled_dot_product_attention(query, query, query).detach()
    del query
    assert ledger.allocated_bytes(0) == output.nbytes


def test_rms_norm_allocates_its_output_only(ledger):
    tokens, weight = (torch.ones(shape, dtype=torch.bfloat16, device="vgpu:0") for shape in ((16, 64), (64,)))
    before = ledger.allocated_bytes(0)
    ledger.reset_peak()
    torch.nn.functional.rms_norm(tokens, (64,), weight)
    assert ledger.peak_bytes(0) - before == tokens.nbytes


def test_widening_softmax_allocates_its_output_only(ledger):
    scores = torch.zeros(4, 256, dtype=torch.bfloat16, device="vgpu:0")
    before = ledger.allocated_bytes(0)
    ledger.reset_peak()
    torch.softmax(scores, -1, dtype=torch.float32)
    assert ledger.peak_bytes(0) - before == 4096


def test_linear_with_bias_allocates_its_output_only(ledger):
    module = torch.nn.Linear(32, 64, device="vgpu:0")
    tokens = torch.zeros(2, 8, 32, device="vgpu:0")
    before = ledger.allocated_bytes(0)
    ledger.reset_peak()
    with torch.no_grad():
        module(tokens)
    assert ledger.peak_bytes(0) - before == 2 * 8 * 64 * 4


def test_mismatch_is_found_before_anything_is_computed(ledger):
    written = torch.zeros(4, device="vgpu:0")
    with pytest.raises(DeviceMismatchError):
        written.add_(torch.ones(4, device="vgpu:1"))
    assert written.tolist() == [0.0] * 4
