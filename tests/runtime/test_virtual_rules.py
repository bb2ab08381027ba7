"""CUDA's rules on mixing devices: the table as a pure function, and the same rules on real operations.

What is expected here is taken from PyTorch's sources and messages that users report; no test of this file has
been compared with a machine that has several GPUs.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen

from runtime.virtual import DeviceMismatchError, virtual_gpus
from runtime.virtual.adapter import cpu_operations, signature_of
from runtime.virtual.rules import ITERATOR, STRICT, Operand, complaint, rule_for

TWO = "Expected all tensors to be on the same device, but found at least two devices, {} and {}!"
CHECKING = " (when checking argument for argument {} in method wrapper_vgpu_{})"


def operand(argument, device, *shape, is_written=False):
    return Operand(argument=argument, device=device, shape=shape, is_written=is_written)


PURE_CASES = [
    ("one device", "cat", [operand("tensors", "vgpu:0", 2), operand("tensors", "vgpu:0", 2)], None),
    (
        "two devices",
        "cat",
        [operand("tensors", "vgpu:0", 2), operand("tensors", "vgpu:1", 2)],
        TWO.format("vgpu:0", "vgpu:1") + CHECKING.format("tensors", "cat"),
    ),
    ("number-like CPU tensor", "add", [operand("self", "vgpu:1", 2), operand("other", "cpu")], None),
    ("number-like CPU tensor first", "add", [operand("self", "cpu"), operand("other", "vgpu:1", 2)], None),
    (
        "one-element CPU tensor is no scalar",
        "add",
        [operand("self", "vgpu:1", 2), operand("other", "cpu", 1)],
        TWO.format("vgpu:1", "cpu"),
    ),
    (
        "scalar of another device",
        "add",
        [operand("self", "vgpu:1", 2), operand("other", "vgpu:0")],
        TWO.format("vgpu:1", "vgpu:0"),
    ),
    (
        "written CPU scalar",
        "add_",
        [operand("self", "cpu", is_written=True), operand("other", "vgpu:0")],
        TWO.format("vgpu:0", "cpu"),
    ),
    (
        "two CPU scalars",
        "addcmul",
        [operand("self", "vgpu:0", 2), operand("tensor1", "cpu"), operand("tensor2", "cpu")],
        "Trying to pass too many CPU scalars to non-CPU kernel!",
    ),
    (
        "CPU scalar outside an iterator",
        "mm",
        [operand("self", "vgpu:0", 2, 2), operand("mat2", "cpu")],
        TWO.format("vgpu:0", "cpu") + CHECKING.format("mat2", "mm"),
    ),
    ("copy", "copy_", [operand("self", "cpu", 2, is_written=True), operand("src", "vgpu:3", 2)], None),
]


@pytest.mark.parametrize(
    ("name", "operands", "expected"), [case[1:] for case in PURE_CASES], ids=[c[0] for c in PURE_CASES]
)
def test_table_decides_by_operation_and_operands(name, operands, expected):
    rule = rule_for(name, "", is_pointwise=name.startswith("add"))
    assert complaint(rule, operands, f"wrapper_vgpu_{name}") == expected


def test_overload_has_its_own_rule_before_its_operation():
    assert rule_for("clamp", "Tensor", is_pointwise=True) is not ITERATOR
    assert rule_for("clamp", "", is_pointwise=True) is ITERATOR
    assert rule_for("equal", "", is_pointwise=True) is STRICT


@pytest.fixture(scope="module")
def two_gpus():
    return virtual_gpus([2**20] * 2)


@pytest.fixture
def lie(two_gpus):
    """Tensors named by where they lie: `a` and scalar `s0` on vgpu:0, `b` and `t` on vgpu:1, `c` and `s` on the CPU."""
    return SimpleNamespace(
        a=torch.ones(2, 3, device="vgpu:0"),
        b=torch.ones(2, 3, device="vgpu:1"),
        c=torch.ones(2, 3),
        s=torch.tensor(2.0),
        s0=torch.tensor(2.0, device="vgpu:0"),
        t=torch.tensor(2.0, device="vgpu:1"),
        mask0=torch.ones(2, 3, dtype=torch.bool, device="vgpu:0"),
        mask1=torch.ones(2, 3, dtype=torch.bool, device="vgpu:1"),
        index=torch.tensor([1]),
        index0=torch.tensor([1], device="vgpu:0"),
        index1=torch.tensor([1], device="vgpu:1"),
    )


ALLOWED = {
    "add CPU scalar": lambda x: x.a + x.s,
    "CPU scalar minus tensor": lambda x: x.s - x.a,
    "compare with CPU scalar": lambda x: x.a < x.s,
    "divide in place by CPU scalar": lambda x: x.a.div_(x.s),
    "maximum with CPU scalar": lambda x: torch.maximum(x.a, x.s),
    "clamp_min by CPU scalar": lambda x: torch.clamp_min(x.a, x.s),
    "lerp weight on CPU": lambda x: torch.lerp(x.a, x.a, x.s),
    "python number": lambda x: x.a % 3,
    "where with scalars from everywhere": lambda x: torch.where(x.mask0, x.s, x.t),
    "masked_fill with the other device's scalar": lambda x: x.a.masked_fill(x.mask0, x.t),
    "masked_fill with a CPU scalar": lambda x: x.a.masked_fill_(x.mask0, x.s),
    "fill with the other device's scalar": lambda x: x.a.fill_(x.t),
    "index by CPU tensor": lambda x: x.a[x.index],
    "index by own tensor": lambda x: x.a[x.index0],
    "index by CPU mask": lambda x: x.a[x.c > 0],
    "put at CPU index": lambda x: x.a.index_put_((x.index,), x.a[0]),
    "put a CPU scalar": lambda x: x.a.index_put_((x.index0,), x.s),
    "put the other device's scalar": lambda x: x.a.index_put_((x.index0,), x.t),
    "set item to a number": lambda x: x.a.__setitem__(x.index, 5.0) or x.a,
    "copy from the other device": lambda x: x.a.copy_(x.b),
    "copy from the CPU": lambda x: x.a.copy_(x.c),
    "to the other device and back": lambda x: x.a.to("vgpu:1").to("vgpu:0"),
}


@pytest.mark.parametrize("call", ALLOWED.values(), ids=ALLOWED)
def test_operation_runs_on_its_device(call, lie):
    assert call(lie).device == torch.device("vgpu:0")


def test_cpu_receives_a_copy_from_any_device(lie):
    assert lie.c.zero_().copy_(lie.b).tolist() == [[1.0] * 3] * 2


REFUSED = {
    "add": (lambda x: x.a + x.b, TWO.format("vgpu:0", "vgpu:1")),
    "add CPU tensor": (lambda x: x.a + x.c, TWO.format("vgpu:0", "cpu")),
    "CPU tensor first": (lambda x: x.c + x.a, TWO.format("vgpu:0", "cpu")),
    "add the other device's scalar": (lambda x: x.a + x.t, TWO.format("vgpu:0", "vgpu:1")),
    "in place": (lambda x: x.a.mul_(x.b), TWO.format("vgpu:0", "vgpu:1")),
    "in place on a CPU scalar": (lambda x: x.s.add_(x.s0), TWO.format("vgpu:0", "cpu")),
    "clamp by a CPU scalar": (lambda x: torch.clamp(x.a, min=x.s), TWO.format("vgpu:0", "cpu")),
    "cat": (lambda x: torch.cat([x.a, x.b]), TWO.format("vgpu:0", "vgpu:1") + CHECKING.format("tensors", "cat")),
    "stack": (lambda x: torch.stack([x.a, x.c]), TWO.format("vgpu:0", "cpu") + CHECKING.format("tensors", "cat")),
    "embedding": (
        lambda x: torch.nn.functional.embedding(x.index, x.a),
        TWO.format("vgpu:0", "cpu") + CHECKING.format("index", "_index_select"),
    ),
    "index_select": (
        lambda x: x.a.index_select(0, x.index1),
        TWO.format("vgpu:0", "vgpu:1") + CHECKING.format("index", "_index_select"),
    ),
    "gather": (
        lambda x: x.a.gather(0, torch.zeros(1, 3, dtype=torch.long)),
        TWO.format("vgpu:0", "cpu") + CHECKING.format("index", "gather"),
    ),
    "linear weight": (
        lambda x: torch.nn.functional.linear(x.a, x.b),
        TWO.format("vgpu:0", "vgpu:1") + CHECKING.format("mat2", "mm"),
    ),
    "linear input": (
        lambda x: torch.nn.functional.linear(x.a, x.b, x.b[:, 0]),
        TWO.format("vgpu:1", "vgpu:0") + CHECKING.format("mat1", "addmm"),
    ),
    "layer_norm": (
        lambda x: torch.nn.functional.layer_norm(x.a, (3,), x.b[0]),
        TWO.format("vgpu:0", "vgpu:1") + CHECKING.format("weight", "_native_layer_norm"),
    ),
    "attention": (
        lambda x: torch.nn.functional.scaled_dot_product_attention(x.a[None], x.b[None], x.b[None]),
        TWO.format("vgpu:0", "vgpu:1") + CHECKING.format("key", "_scaled_dot_product_attention"),
    ),
    "where": (lambda x: torch.where(x.mask0, x.b, x.a), TWO.format("vgpu:0", "vgpu:1")),
    "masked_fill": (
        lambda x: x.a.masked_fill(x.mask1, 0.0),
        "expected self and mask to be on the same device, but got mask on vgpu:1 and self on vgpu:0",
    ),
    "masked_fill on the CPU": (
        lambda x: x.c.masked_fill(x.mask1, 0.0),
        "expected self and mask to be on the same device, but got mask on vgpu:1 and self on cpu",
    ),
    "index": (
        lambda x: x.a[x.index1],
        "indices should be either on cpu or on the same device as the indexed tensor (vgpu:0)",
    ),
    "index the CPU": (
        lambda x: x.c[x.index1],
        "indices should be either on cpu or on the same device as the indexed tensor (cpu)",
    ),
    "put a CPU row": (lambda x: x.a.index_put_((x.index,), x.c[0]), TWO.format("vgpu:0", "cpu")),
    "device-less arange": (lambda x: x.a + torch.arange(3), TWO.format("vgpu:0", "cpu")),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_operation_is_refused_in_the_words_of_cuda(call, message, lie):
    with pytest.raises(DeviceMismatchError) as caught:
        call(lie)
    assert str(caught.value) == message


def test_mismatch_tells_operation_operands_and_devices(lie):
    with pytest.raises(RuntimeError) as caught:
        torch.cat([lie.a, lie.a, lie.b[:1]])
    error = caught.value
    assert isinstance(error, DeviceMismatchError)
    assert error.op_name == "cat"
    assert error.devices == ("vgpu:0", "vgpu:1")
    assert [(found.device, found.shape) for found in error.operands] == [
        ("vgpu:0", (2, 3)),
        ("vgpu:0", (2, 3)),
        ("vgpu:1", (1, 3)),
    ]


def test_every_iterator_is_one_in_pytorchs_own_list():
    """`device_check: NoCheck` marks operations that leave the check to TensorIterator."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = {entry.partition("(")[0]: entry for entry in text.split("\n- func: ")[1:]}
    unchecked = {name for name, entry in entries.items() if "device_check: NoCheck" in entry}
    wrong = []
    for op in cpu_operations():
        signature = signature_of(op)
        name = ".".join(filter(None, (signature.name, signature.overload_name)))
        num_inputs = sum(argument.is_tensor and not argument.is_out for argument in signature.arguments)
        rule = rule_for(signature.name, signature.overload_name, is_pointwise=signature.is_pointwise)
        delegate = entries.get(name, "").partition("structured_delegate: ")[2].partition("\n")[0]
        if rule is ITERATOR and num_inputs > 1 and name in entries and not {name, delegate} & unchecked:
            wrong.append(name)
    assert len(entries) > 2000
    assert wrong == []
