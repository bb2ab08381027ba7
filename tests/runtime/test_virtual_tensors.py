"""Tensors on virtual GPUs: made, moved, viewed and computed with as on any device, with the CPU's values to the bit."""

import copy

import pytest
import torch
import torch.nn.functional as F

from runtime.virtual import virtual_gpus

DEVICE = "vgpu:1"


@pytest.fixture(scope="module", autouse=True)
def gpus():
    return virtual_gpus([2**26] * 3)


FACTORIES = {
    "empty": lambda device: torch.empty(3, 4, device=device).fill_(1),
    "empty_strided": lambda device: torch.empty_strided((2, 3), (1, 2), device=device).zero_(),
    "zeros": lambda device: torch.zeros(3, dtype=torch.int32, device=device),
    "ones": lambda device: torch.ones((2, 2), dtype=torch.bfloat16, device=device),
    "full": lambda device: torch.full((2,), True, device=device),
    "arange": lambda device: torch.arange(2, 9, 2, device=device),
    "linspace": lambda device: torch.linspace(0, 1, 5, device=device),
    "eye": lambda device: torch.eye(3, device=device),
    "tril_indices": lambda device: torch.tril_indices(3, 3, device=device),
    "triu": lambda device: torch.triu(torch.full((3, 3), float("-inf"), device=device), diagonal=1),
    "tensor": lambda device: torch.tensor([[1, 2], [3, 4]], device=device),
    "tensor of a float": lambda device: torch.tensor(0.5, device=device),
    "as_tensor": lambda device: torch.as_tensor([1.0, 2.0], device=device),
    "scalar_tensor": lambda device: torch.scalar_tensor(3, device=device),
    "rand": lambda device: torch.rand(4, device=device),
    "randn": lambda device: torch.randn(4, device=device),
    "randint": lambda device: torch.randint(0, 9, (4,), device=device),
    "randperm": lambda device: torch.randperm(7, device=device),
    "zeros_like": lambda device: torch.zeros_like(torch.ones(2, 3, device=device)),
    "ones_like": lambda device: torch.ones_like(torch.ones(2, 3, device=device), dtype=torch.int8),
    "full_like": lambda device: torch.full_like(torch.ones(2, 3, device=device), 7),
    "rand_like": lambda device: torch.rand_like(torch.ones(2, 3, device=device)),
    "new_zeros": lambda device: torch.ones(2, device=device).new_zeros(5),
    "new_full": lambda device: torch.ones(2, device=device).new_full((2,), 3),
    "new_tensor": lambda device: torch.ones(2, device=device).new_tensor([1, 2]),
    "new": lambda device: torch.ones(2, device=device).new(2, 3).fill_(2),
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_factory_makes_what_the_cpu_makes(make):
    torch.manual_seed(0)
    expected = make("cpu")
    torch.manual_seed(0)
    made = make(DEVICE)
    assert (type(made), made.device) == (torch.Tensor, torch.device(DEVICE))
    assert (made.dtype, made.stride()) == (expected.dtype, expected.stride())
    assert torch.equal(made.cpu(), expected)


def test_device_context_reaches_factories():
    with torch.device("vgpu:2"):
        assert torch.arange(3).device == torch.device("vgpu:2")


def test_device_without_index_is_the_first():
    assert torch.ones(1).to("vgpu").device == torch.device("vgpu:0") == torch.ones(1, device="vgpu").device


def test_bare_integer_is_a_virtual_gpu():
    """Torch's current accelerator is vgpu, which is how accelerate's integer device maps arrive here."""
    assert torch.ones(1).to(2).device == torch.device("vgpu:2")
    assert torch.accelerator.current_accelerator() == torch.device("vgpu")


READ_OUT = {
    "item": lambda t: t[0, 1].item(),
    "tolist": lambda t: t.tolist(),
    "bool": lambda t: bool((t > 0).any()),
    "int": lambda t: int(t[1, 2]),
    "iteration": lambda t: [row.tolist() for row in t],
    "equal": lambda t: torch.equal(t, t.clone()),
    "allclose": lambda t: torch.allclose(t, t + 1e-9),
    "nonzero": lambda t: t.nonzero().tolist(),
    "max": lambda t: [part.tolist() for part in t.max(dim=1)],
    "unique": lambda t: t.unique().tolist(),
    "len": len,
    "contains": lambda t: 3.0 in t,
    "cpu numpy": lambda t: t.cpu().numpy().tolist(),
    "numpy method": lambda t: t.numpy(force=True).tolist(),
    "format": lambda t: f"{t[0, 1]:.2f}",
}


@pytest.mark.parametrize("read", READ_OUT.values(), ids=READ_OUT)
def test_values_are_read_out_as_on_the_cpu(read):
    tensor = torch.arange(6.0).view(2, 3)
    assert read(tensor.to(DEVICE)) == read(tensor)


def test_numpy_is_refused_as_for_cuda():
    with pytest.raises(TypeError, match=r"can't convert vgpu:1 device type tensor to numpy\. Use Tensor\.cpu\(\)"):
        torch.ones(2, device=DEVICE).numpy()


def test_printing_names_the_device():
    assert str(torch.ones(2, device=DEVICE)) == "tensor([1., 1.], device='vgpu:1')"


MOVES = {
    "to the CPU": lambda t: t.cpu(),
    "to the CPU, not waiting": lambda t: t.to("cpu", non_blocking=True),
    "to another device": lambda t: t.to("vgpu:2", non_blocking=True),
    "to another dtype": lambda t: t.to(torch.bfloat16),
    "to both": lambda t: t.to("vgpu:0", torch.float64),
    "like another": lambda t: t.to(torch.ones(1, dtype=torch.float64, device="vgpu:0")),
    "by method": lambda t: t.vgpu(2),
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(),
    "deepcopy": lambda t: copy.deepcopy(t),
    "copy_": lambda t: torch.zeros(3, 2, device="vgpu:2").copy_(t),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_move_copies_the_values(move):
    host = torch.tensor([[1.5, 2.0, -3.0], [4.0, 5.0, 6.0]]).t()
    source = host.to(DEVICE)
    moved = move(source)
    source.zero_()
    assert torch.equal(moved.cpu().double(), host.double())


def test_module_moves_there_and_back_with_its_own_class_and_attributes():
    module = torch.nn.Linear(4, 4)
    module.weight.tag = "kept"
    expected = module.weight.detach().clone()
    weight = module.to(DEVICE).weight
    assert (type(weight), weight.device, weight.tag, weight.requires_grad) == (
        torch.nn.Parameter,
        torch.device(DEVICE),
        "kept",
        True,
    )
    assert torch.equal(module.cpu().weight, expected)


def test_meta_module_materialises_and_loads_a_state_dict():
    with torch.device("meta"):
        module = torch.nn.Linear(4, 4)
    module.to_empty(device=DEVICE)
    source = torch.nn.Linear(4, 4)
    module.load_state_dict(source.state_dict())
    assert module.weight.device == torch.device(DEVICE)
    assert torch.equal(module.state_dict()["weight"].cpu(), source.weight)


def test_conjugate_and_negative_bits_survive_copies():
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    moved = numbers.to(DEVICE)
    assert torch.equal(moved.conj().cpu(), numbers.conj().resolve_conj())
    assert torch.equal(moved.conj().imag.clone().cpu(), numbers.conj().imag.resolve_neg())


def test_write_through_a_view_is_seen_by_the_whole():
    tensor = torch.zeros(2, 3, device=DEVICE)
    tensor.t()[1].add_(5)
    tensor[0, 0] = 1
    assert tensor.tolist() == [[1.0, 5.0, 0.0], [0.0, 5.0, 0.0]]


def test_integer_histogram_counts_as_on_cuda():
    experts = torch.tensor([0, 2, 2, 1], dtype=torch.int32, device=DEVICE)
    counts = torch.histc(experts, bins=4, min=0, max=3)
    assert (counts.dtype, counts.tolist()) == (torch.int32, [1, 1, 2, 0])


DTYPES = [torch.float32, torch.bfloat16]
B, T, H, E, D = 2, 17, 4, 16, 64


def tensors(dtype, *shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


SAME_BITS = {
    "linear": (F.linear, (B, T, D), (96, D)),
    "linear with bias": (F.linear, (B, T, D), (96, D), (96,)),
    "linear in two dimensions": (F.linear, (T, D), (96, D), (96,)),
    "linear of one token": (F.linear, (1, 1, D), (96, D), (96,)),
    "linear of a transposed input": (lambda x, w, b: F.linear(x.transpose(1, 2), w, b), (B, D, T), (96, D), (96,)),
    "matmul": (torch.matmul, (B, H, T, E), (B, H, E, T)),
    "matmul broadcast": (torch.matmul, (B, H, T, E), (E, T)),
    "matmul with a vector": (torch.matmul, (B, T, D), (D,)),
    "bmm": (torch.bmm, (B, T, D), (B, D, T)),
    "einsum": (lambda q, k: torch.einsum("bhte,bhse->bhts", q, k), (B, H, T, E), (B, H, T, E)),
    "conv2d": (F.conv2d, (B, 3, 28, 28), (32, 3, 14, 14), (32,)),
    "conv2d strided": (lambda x, w: F.conv2d(x, w, stride=14), (B, 3, 28, 28), (32, 3, 14, 14)),
    "conv3d": (F.conv3d, (B, 3, 2, 14, 14), (32, 3, 2, 14, 14)),
    "conv1d depthwise": (lambda x, w: F.conv1d(x, w, groups=D, padding=3), (B, D, T), (D, 1, 4)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (D,), w, b), (B, T, D), (D,), (D,)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (D,), w), (B, T, D), (D,)),
    "group_norm": (lambda x: F.group_norm(x, 4), (B, 16, 7, 7)),
    "batch_norm": (lambda x, m, v: F.batch_norm(x, m.detach(), v.detach().abs()), (B, 16, 7, 7), (16,), (16,)),
    "softmax": (lambda x: F.softmax(x, -1), (B, H, T, T)),
    "softmax in float32": (lambda x: F.softmax(x, -1, dtype=torch.float32), (B, H, T, T)),
    "log_softmax in float32": (lambda x: F.log_softmax(x, -1, dtype=torch.float32), (B, T, D)),
    "gelu": (F.gelu, (B, T, D)),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), (B, T, D)),
    "silu": (F.silu, (B, T, D)),
    "interpolate": (lambda x: F.interpolate(x, size=(9, 9), mode="bicubic"), (B, 3, 7, 7)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (B, 16, 7, 7)),
    "attention": (F.scaled_dot_product_attention, (B, H, T, E), (B, H, T, E), (B, H, T, E)),
    "causal attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (B, H, T, E),
        (B, H, T, E),
        (B, H, T, E),
    ),
    "grouped-query attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5),
        (B, H, T, E),
        (B, 2, T, E),
        (B, 2, T, E),
    ),
    "masked attention": (
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask > 0),
        (B, H, T, E),
        (B, H, T, E),
        (B, H, T, E),
        (B, 1, T, T),
    ),
    "biased attention": (F.scaled_dot_product_attention, (B, H, 1, E), (B, H, T, E), (B, H, T, E), (B, 1, 1, T)),
    "cumsum": (lambda x: x.cumsum(-1), (B, T, D)),
    "topk": (lambda x: torch.cat(x.topk(5)), (B, T, D)),
    "sort": (lambda x: x.sort(descending=True).values, (B, T, D)),
    "masked_scatter": (lambda x, y: x.masked_scatter(x > 0, y), (B, T, D), (B, T, D)),
    "index_add": (lambda x, y: x.index_add(1, (y[0] * 0).long()[:, 0], y), (B, T, D), (B, T, D)),
    "python scalar arithmetic": (lambda x: (1.1 - x * 0.1) ** 2 / 3 % 0.7, (B, T, D)),
    "multinomial": (lambda x: x.softmax(-1).multinomial(3), (B, D)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SAME_BITS.values(), ids=SAME_BITS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_operation_has_the_bits_and_strides_of_the_cpu(case, dtype, grad):
    function, *shapes = case
    operands = tensors(dtype, *shapes)
    if grad:
        operands = [torch.nn.Parameter(operand) for operand in operands]
    with torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        expected = function(*operands)
        torch.manual_seed(0)
        got = function(*[operand.to(DEVICE) for operand in operands])
    assert (got.device, got.dtype, got.stride()) == (torch.device(DEVICE), expected.dtype, expected.stride())
    assert torch.equal(got.cpu(), expected)


MODULES = {
    "LSTM": (lambda: torch.nn.LSTM(8, 8, batch_first=True), lambda module, x: module(x)[0]),
    "GRU": (lambda: torch.nn.GRU(8, 8, batch_first=True), lambda module, x: module(x)[0]),
    "attention": (lambda: torch.nn.MultiheadAttention(8, 2), lambda module, x: module(x, x, x)[0]),
    "encoder": (lambda: torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), lambda module, x: module(x)),
}


@pytest.mark.parametrize(("make", "call"), MODULES.values(), ids=MODULES)
def test_composite_module_has_the_bits_of_the_cpu(make, call):
    torch.manual_seed(0)
    module, tokens = make().eval(), torch.randn(2, 5, 8)
    twin = copy.deepcopy(module).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(call(twin, tokens.to(DEVICE)).cpu(), call(module, tokens))


def test_inference_mode_computes_the_same():
    module = torch.nn.Linear(4, 4)
    tokens = torch.randn(2, 3, 4)
    with torch.inference_mode():
        expected = module(tokens)
        got = copy.deepcopy(module).to(DEVICE)(tokens.to(DEVICE))
        assert got.is_inference()
        assert torch.equal(got.cpu(), expected)


def test_dispatch_mode_sees_every_operation_with_its_device():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.seen.append((str(function), str(out.device)))
            return out

    tokens = torch.ones(1, 2, 4, 8, device=DEVICE)
    with Recorder() as recorder:
        F.scaled_dot_product_attention(tokens, tokens, tokens).to("vgpu:2")
    assert recorder.seen == [
        ("aten.scaled_dot_product_attention.default", "vgpu:1"),
        ("aten._to_copy.default", "vgpu:2"),
    ]
