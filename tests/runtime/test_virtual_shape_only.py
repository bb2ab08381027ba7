"""Shape-only mode, operation by operation: sizes, layouts and bytes are those of real values, without any."""

import copy
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from runtime.virtual import DeviceMismatchError, ShapeOnlyError, virtual_gpus
from runtime.virtual.process import PROCESS
from runtime.virtual.shapes import SMALL_NUMEL, is_shape_only

GIB = 2**30
DEVICE = "vgpu:0"
LARGE = SMALL_NUMEL + 1
B, T, H, E, D = 2, 17, 4, 16, 64


class Recorder:
    """Writes down what every computing operation returns, and refuses misplaced operands as without it."""

    def __init__(self):
        self.seen = []

    def mismatched(self, problem, tensors):
        raise problem

    def ran(self, op, args, outcome):
        self.seen.append((op.name(), looks(outcome)))

    def copied(self, source, copy):
        self.seen.append(("copied", looks(copy)))


def looks(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, str(value.device)
    return [looks(item) for item in value] if isinstance(value, list | tuple) else type(value)


def has_no_bytes(tensor):
    return is_shape_only(tensor, PROCESS.shape_only)


@pytest.fixture
def gpus():
    return virtual_gpus([64 * GIB] * 2, shape_only=True)


def unknown(*shape, dtype=torch.float32, device=DEVICE):
    """A tensor without bytes, of any size: a meta tensor's copy."""
    return torch.empty(shape, dtype=dtype, device="meta").to(device)


def observed(function, shapes, dtype, shape_only):
    """What operations return, and the bytes alive afterwards and at the peak."""
    ledger = virtual_gpus([GIB], shape_only=shape_only).ledger
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    operands = [(tensor.to("meta") if shape_only else tensor).to(DEVICE) for tensor in host]
    recorder = PROCESS.observer = Recorder()
    try:
        outcome = function(*operands)
    finally:
        PROCESS.observer = None
    return recorder.seen, looks(outcome), ledger.allocated_bytes(0), ledger.peak_bytes(0)


def ids(count, end=5):
    return torch.arange(count, device=DEVICE) % end


MASK = [True, False, True] + [False] * (T - 3)
FAMILIES = {
    "linear": (F.linear, (B, T, D), (96, D), (96,)),
    "linear of a transposed input": (lambda x, w: F.linear(x.transpose(1, 2), w), (B, D, T), (96, D)),
    "matmul broadcast": (torch.matmul, (B, H, T, E), (E, T)),
    "einsum": (lambda q, k: torch.einsum("bhte,bhse->bhts", q, k), (B, H, T, E), (B, H, T, E)),
    "baddbmm": (torch.baddbmm, (B, T, T), (B, T, D), (B, D, T)),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=14), (B, 3, 28, 28), (32, 3, 14, 14), (32,)),
    "conv2d channels last": (lambda x, w: F.conv2d(x.permute(0, 3, 1, 2), w), (B, 9, 9, 8), (16, 8, 3, 3)),
    "conv2d 1x1": (F.conv2d, (B, 8, 9, 9), (16, 8, 1, 1)),
    "conv3d": (F.conv3d, (B, 3, 2, 14, 14), (32, 3, 2, 14, 14)),
    "conv1d depthwise": (lambda x, w: F.conv1d(x, w, groups=D, padding=3), (B, D, T), (D, 1, 4)),
    "layer_norm": (lambda x, w: F.layer_norm(x.transpose(1, 2), (D,), w), (B, D, T), (D,)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (D,), w), (B, T, D), (D,)),
    "group_norm": (lambda x: F.group_norm(x, 4), (B, 16, 7, 7)),
    "softmax in float32": (lambda x: F.softmax(x, -1, dtype=torch.float32), (B, H, T, T)),
    "activations": (lambda x: F.silu(F.gelu(x, approximate="tanh")).sigmoid(), (B, T, D)),
    "pointwise broadcast": (lambda x, y: (x.transpose(1, 2) * y + 1).neg(), (B, D, T), (D,)),
    "pointwise with size 1": (lambda x, y: 2 * (x.transpose(1, 2) * y), (B, 1, T, E), (E,)),
    "python scalar arithmetic": (lambda x: (1.1 - x * 0.1) ** 2 / 3 % 0.7, (B, T, D)),
    "reductions": (lambda x: [x.mean(-1, keepdim=True), x.amax(1), x.sum(), x.var(0), x.norm()], (B, T, D)),
    "cumsum": (lambda x: x.cumsum(-1), (B, T, D)),
    "attention": (F.scaled_dot_product_attention, (B, H, T, E), (B, H, T, E), (B, H, T, E)),
    "attention of split heads": (
        lambda x: F.scaled_dot_product_attention(*[t.transpose(1, 2) for t in x.unbind(2)], is_causal=True),
        (B, T, 3, H, E),
    ),
    "grouped-query attention": (
        lambda q, k, m: F.scaled_dot_product_attention(q.transpose(1, 2), k, k, attn_mask=m, enable_gqa=True),
        (B, T, H, E),
        (B, 2, T, E),
        (B, 1, T, T),
    ),
    "attention of three dimensions": (F.scaled_dot_product_attention, (H, T, E), (H, T, E), (H, T, E)),
    "joins and parts": (lambda x, y: torch.stack([torch.cat([x, y], 1).chunk(2, 1)[0]] * 2), (B, T, D), (B, T, D)),
    "padding": (lambda x: F.pad(x, (1, 2, 0, 3)), (B, T, D)),
    "interpolate": (lambda x: F.interpolate(x, size=(9, 9), mode="bicubic", antialias=True), (B, 3, 7, 7)),
    "pooling": (lambda x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 2), (B, 16, 14, 14)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (B, 4, 8, 8)),
    "embedding": (lambda w: F.embedding(ids(T).view(1, T), w), (5, D)),
    "index": (lambda x: [x[-ids(2)], x[:, ids(4)], x[ids(2), ids(2)], x[None, :, ids(3)]], (B, T, D)),
    "index by mask": (lambda x: [x[:, torch.tensor(MASK, device=DEVICE)], x[x.new_tensor([1, 0]).bool()]], (B, T, D)),
    "masked_select": (lambda x: x.masked_select(torch.tensor(MASK, device=DEVICE)[:, None]), (B, T, D)),
    "masked_scatter": (lambda x, y: x.masked_scatter(torch.tensor(MASK, device=DEVICE)[:, None], y), (T, D), (2, D)),
    "masked_fill": (lambda x: x.masked_fill(ids(D) > 2, float("-inf")), (B, T, D)),
    "where": (lambda x, y: torch.where(ids(D) > 2, x, y.float()), (B, T, D), (D,)),
    "gather and scatter": (lambda x: x.scatter_add(1, ids(5).expand(B, 5), x.gather(1, ids(5).expand(B, 5))), (B, T)),
    "index_add and index_copy": (
        lambda x, y: x.index_add(1, ids(5), y).index_copy_(1, ids(5), y),
        (B, T, D),
        (B, 5, D),
    ),
    "set items": (lambda x, y: [x.__setitem__(MASK, 0.0), x.__setitem__((slice(None), 0), y), x], (T, D), (T,)),
    "in place": (lambda x, y: x.add_(y).mul_(2).clamp_(0, 1).div_(y.sum()), (T, D), (T, D)),
    "out": (lambda x, y: torch.mm(x, y, out=torch.empty(0, device=DEVICE, dtype=x.dtype)), (T, D), (D, T)),
    "copies": (lambda x: [x.clone(), x.t().clone(), x[:, ::2].clone(), x.t().contiguous(), copy.deepcopy(x)], (T, D)),
    "casts": (lambda x: [x.t().double(), x[:, ::2].half(), x.to(torch.bfloat16)], (T, D)),
    "copy from another": (lambda x, y: torch.empty_like(x).copy_(y), (T, D), (T, 1)),
    "new ones like it": (lambda x: [torch.zeros_like(x.t()), x.new_ones(3), torch.rand_like(x)], (T, D)),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(x).conj()), (T, D, 2)),
    "repeat_interleave": (lambda x: x.repeat_interleave(ids(T), 0), (T, D)),
    "topk": (lambda x: x.topk(3), (B, T)),
    "sort": (lambda x: x.sort(0, descending=True), (B, T)),
    "roll and flip": (lambda x: x.roll((1, 2), (0, 1)).flip(-1), (T, D)),
    "triangles": (lambda x: [x.triu(1), x.tril()], (T, T)),
    "fft": (lambda x: torch.fft.rfft(x.float()), (T, D)),
    "lstm": (
        lambda x, *w: torch.lstm(x, [x[:1].new_zeros(1, T, E)] * 2, w, True, 1, 0.0, False, False, True),
        (T, B, D),
    )
    + ((4 * E, D), (4 * E, E), (4 * E,), (4 * E,)),
    "grouped_mm": (
        lambda x, w: F.grouped_mm(x, w.transpose(1, 2), offs=torch.tensor([4, 16], dtype=torch.int32, device=DEVICE)),
        (16, D),
        (2, 24, D),
    ),
}
# What the CPU keeps in the input's type and CUDA, like torch's meta functions, in float32.
HAVE_STATISTICS = {"layer_norm", "group_norm"}
NEED_FLOAT32 = HAVE_STATISTICS | {"interpolate", "complex"}
CASES = [(family, torch.float32) for family in FAMILIES]
CASES += [(family, torch.bfloat16) for family in FAMILIES if family not in NEED_FLOAT32]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=[f"{family} in {dtype}" for family, dtype in CASES])
def test_results_and_bytes_are_those_of_real_values(family, dtype):
    function, *shapes = FAMILIES[family]
    expected = observed(function, shapes, dtype, shape_only=False)
    assert observed(function, shapes, dtype, shape_only=True) == expected


def test_statistics_of_16_bit_norms_are_kept_in_32_as_on_cuda(gpus):
    normalised, mean, deviation = torch.native_layer_norm(unknown(T, D, dtype=torch.bfloat16), (D,), None, None, 1e-5)
    assert (normalised.dtype, mean.dtype, deviation.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_batch_norm_returns_its_statistics_as_on_cuda(gpus):
    """Without training the CPU returns empty ones; see native_batch_norm_helper in torch/_decomp/decompositions.py."""
    numbers = unknown(4)
    normalised, mean, deviation = torch.native_batch_norm(
        unknown(B, 4, 7, 7), None, None, numbers, numbers, False, 0.1, 1e-5
    )
    assert (normalised.shape, mean.shape, deviation.shape) == ((B, 4, 7, 7), (4,), (4,))


# What is real


REAL = {
    "positions": (lambda: torch.linspace(0, 1, 5, device=DEVICE).mul(7).floor().long().tolist(), [0, 1, 3, 5, 7]),
    "ids counted": (lambda: (ids(T) == 4).sum().item(), 3),
    "grid read": (lambda: torch.tensor([[1, 4, 6]], device=DEVICE).prod(-1).tolist(), [24]),
    "cumulated": (lambda: ids(6).cumsum(0)[-1].item(), 10),
    "nonzero": (lambda: torch.tensor(MASK, device=DEVICE).nonzero().flatten().tolist(), [0, 2]),
    "small product": (lambda: (torch.ones(3, device=DEVICE) @ torch.ones(3, device=DEVICE)).item(), 3.0),
    "many integers": (lambda: torch.arange(LARGE, device=DEVICE)[-1].item(), LARGE - 1),
    "many integers copied": (lambda: torch.arange(LARGE).to(DEVICE).to("vgpu:1").cpu()[-1].item(), LARGE - 1),
    "floats on the host": (lambda: torch.arange(LARGE, device=DEVICE).to("cpu", torch.float64)[-1].item(), LARGE - 1),
}


@pytest.mark.parametrize(("compute", "expected"), REAL.values(), ids=REAL)
def test_value_is_real(compute, expected, gpus):
    assert compute() == expected
    assert gpus.decisions == {}


DROPPED = {
    "factory": lambda: torch.zeros(LARGE, device=DEVICE),
    "random": lambda: torch.rand(LARGE, device=DEVICE),
    "range": lambda: torch.arange(LARGE, dtype=torch.float32, device=DEVICE),
    "from the host": lambda: torch.rand(LARGE).to(DEVICE),
    "integers cast": lambda: torch.arange(LARGE, device=DEVICE).float(),
    "integers scaled": lambda: torch.arange(LARGE, device=DEVICE) * 0.5,
    "choice by integers": lambda: torch.where(torch.arange(LARGE, device=DEVICE) > 5, 0.0, float("-inf")),
    "outer product of small ones": lambda: torch.ones(512, 1, device=DEVICE) * torch.ones(512, device=DEVICE),
    "resized": lambda: torch.empty(LARGE, device=DEVICE).resize_(2 * LARGE),
}


@pytest.mark.parametrize("make", DROPPED.values(), ids=DROPPED)
def test_many_floating_point_numbers_have_no_bytes_and_count(make, gpus):
    made = make()
    assert has_no_bytes(made)
    assert gpus.ledger.allocated_bytes(0) == -(-made.nbytes // 512) * 512


def test_size_takes_no_memory_but_capacity(gpus):
    held = unknown(2**33, dtype=torch.bfloat16)
    assert gpus.ledger.allocated_bytes(0) == held.nbytes == 16 * GIB
    view = held.view(2**16, -1)[5:, ::2].t()
    assert has_no_bytes(view)
    del held
    assert gpus.ledger.allocated_bytes(0) == 16 * GIB
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 64\.00 GiB.* of which 48\.00 GiB is free"):
        unknown(2**34, dtype=torch.float32)
    with pytest.raises(torch.OutOfMemoryError, match="more than shape-only virtual GPUs have addresses for"):
        unknown(2**43, dtype=torch.float32)
    del view
    assert gpus.ledger.allocated_bytes(0) == 0


def test_storages_can_be_told_apart_by_their_address(gpus):
    tensors = [unknown(4) for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 3


def test_describe_says_that_nothing_is_computed(gpus):
    assert gpus.is_shape_only
    assert gpus.describe().startswith("2 virtual GPUs: nothing is computed, only placement and memory are modelled")


# Unknown numbers that meet real ones


def test_what_unknown_numbers_are_written_into_is_unknown_with_all_its_views(gpus):
    known = torch.zeros(4, 8, device=DEVICE)
    row = known[1]
    assert not has_no_bytes(known)
    known[0, :] = unknown(8)
    twin = copy.deepcopy(known)
    assert has_no_bytes(known) and has_no_bytes(row) and has_no_bytes(twin)
    assert gpus.ledger.allocated_bytes(0) == 1024
    assert (known.sum() > 0).item() is False


def test_unknown_numbers_written_into_integers_become_zero(gpus):
    counts = torch.ones(3, dtype=torch.long, device=DEVICE)
    counts.copy_(unknown(3))
    assert counts.tolist() == [0, 0, 0]
    assert [(decision.op, count) for decision, count in gpus.decisions.items()] == [("copy_", 1)]


def test_unknown_numbers_written_into_a_host_tensor_are_zeros(gpus):
    assert torch.ones(3).copy_(unknown(3)).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ShapeOnlyError, match="numbers are read on the host"):
        torch.ones(2**21).copy_(unknown(2**21))


# Meta tensors


def test_meta_module_moves_with_its_ties(gpus):
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    module["b"].weight = module["a"].weight
    module.to("vgpu:1")
    assert module["a"].weight is module["b"].weight
    assert (type(module["a"].weight), module["a"].weight.device) == (torch.nn.Parameter, torch.device("vgpu:1"))
    assert gpus.ledger.allocated_bytes(1) == 3 * 512
    module["a"].weight.data.copy_(torch.empty(8, 8, device="meta"))
    assert has_no_bytes(module["a"].weight)


def test_meta_integers_become_zeros_on_record(gpus):
    assert torch.empty(3, dtype=torch.long, device="meta").to(DEVICE).tolist() == [0, 0, 0]
    assert torch.ones(3, dtype=torch.long, device=DEVICE).copy_(torch.empty(1, device="meta")).tolist() == [0, 0, 0]
    assert {decision.rule for decision in gpus.decisions} == {"a meta tensor's integers are unknown: 0"}


def test_meta_tensors_behave_as_ever_elsewhere(gpus):
    meta = torch.empty(3, 2, device="meta")
    assert (meta.half().dtype, meta.to("meta", torch.float64).device.type) == (torch.float16, "meta")
    assert unknown(3).to("meta").shape == (3,)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        meta.cpu()
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        unknown(3).copy_(meta)
    virtual_gpus([GIB])
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        meta.to(DEVICE)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor; no data!"):
        torch.zeros(3, 2, device=DEVICE).copy_(meta)


# Refusals


@pytest.mark.parametrize("shape_only", [False, True], ids=["real values", "shape only"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, b: a + b, DeviceMismatchError, "found at least two devices, vgpu:0 and vgpu:1!$"),
        (lambda a, b: torch.cat([a, b]), DeviceMismatchError, "argument tensors in method wrapper_vgpu_cat"),
        (lambda a, b: F.linear(a, b), DeviceMismatchError, "argument mat2 in method wrapper_vgpu_mm"),
        (lambda a, b: a + torch.ones(4, 4), DeviceMismatchError, "vgpu:0 and cpu!"),
        (lambda a, b: a[ids(2).to("vgpu:1")], DeviceMismatchError, "indices should be either on cpu"),
        (lambda a, b: a @ a[:3], RuntimeError, "same reduction dim|shapes cannot be multiplied"),
        (lambda a, b: a.view(5, 5), RuntimeError, r"shape '\[5, 5\]' is invalid"),
        (lambda a, b: F.embedding(ids(9, 9), a), IndexError, "index out of range in self"),
        (lambda a, b: a[:, ids(9, 9)], IndexError, r"index \d is out of bounds for dimension \d with size 4"),
        (lambda a, b: a[torch.tensor([True] * 3)], IndexError, r"shape of the mask \[3\] at index 0 does not match"),
        (lambda a, b: a.__setitem__(ids(2), a[:3]), RuntimeError, r"shape mismatch: value tensor of shape \[3, 4\]"),
        (lambda a, b: a.masked_scatter(ids(4) > 1, a[0]), RuntimeError, "Number of elements of source"),
    ],
    ids="add cat linear host index product view embedding columns mask put scatter".split(),
)
def test_wrong_operands_are_refused_alike(call, error, message, shape_only):
    virtual_gpus([GIB, GIB], shape_only=shape_only)
    host = torch.empty(4, 4, device="meta") if shape_only else torch.ones(4, 4)
    with pytest.raises(error, match=message):
        call(host.to("vgpu:0"), host.to("vgpu:1"))


UNKNOWABLE = {
    "unique": (lambda x: x.unique(), "_unique2: no shape is known for its result, from operands [8, 262144]"),
    "all logits": (lambda x: x.cpu(), "_to_copy: [8, 262144] numbers are read on the host"),
    "nonzero": (lambda x: x.nonzero(), "nonzero: which of [8, 262144] numbers are zero is unknown"),
}


@pytest.mark.parametrize(("call", "message"), UNKNOWABLE.values(), ids=UNKNOWABLE)
def test_what_nobody_can_know_is_refused_with_the_line(call, message, gpus):
    with pytest.raises(ShapeOnlyError) as caught:
        call(unknown(8, 2**18))
    op, problem = message.split(": ")
    assert caught.value.op == op
    assert re.fullmatch(r"\S+test_virtual_shape_only.py:\d+ in <lambda>", caught.value.place)
    assert str(caught.value).startswith(f"{op} at {caught.value.place}: {problem}")


def test_process_without_addresses_is_refused():
    code = (
        "import resource\n"
        "import torch\n"
        "from runtime.virtual import VirtualGpuUnavailableError, virtual_gpus\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**38, 2**38))\n"
        "try:\n"
        "    virtual_gpus([512], shape_only=True)\n"
        "except VirtualGpuUnavailableError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "reserve 8 TiB of addresses (no memory), and the system refuses" in done.stdout
