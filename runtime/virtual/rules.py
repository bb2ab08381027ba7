"""Which operands of one operation may lie on which devices: CUDA's rules as a table and one pure function.

It turns an operation's name and its operands' devices into nothing (they may meet) or a complaint in CUDA's
words. It knows nothing of tensors or dispatch, and it does not decide where a result goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

CPU = "cpu"


class Leave(Enum):
    """Where an operand may lie besides the device that the operation runs on."""

    NOWHERE = "nowhere else"
    CPU_SCALAR = "on the CPU when it has no dimensions"
    ANY_SCALAR = "anywhere when it has no dimensions"
    CPU = "on the CPU"
    ANYWHERE = "anywhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One tensor handed to an operation: the schema's argument name, where it lies, what it looks like."""

    argument: str
    device: str
    shape: tuple[int, ...]
    is_written: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one operation grants its operands: `leave` by argument, `default` for the others.

    `is_iterator`: CUDA checks inside TensorIterator, which runs on the first device that is not the CPU and does
    not name the argument; otherwise c10's check in the kernel's wrapper, which runs on the first operand's device
    and does. `wording`: CUDA's message by argument where it has its own; `{running}` and `{other}` stand for the
    devices.
    """

    leave: Mapping[str, Leave]
    default: Leave = Leave.NOWHERE
    is_iterator: bool = False
    wording: Mapping[str, str] | None = None


class DeviceMismatchError(RuntimeError):
    """Operands that CUDA would refuse to combine: `.op_name`, `.operands` with devices and shapes."""

    def __init__(self, message: str, *, op_name: str, operands: tuple[Operand, ...]) -> None:
        super().__init__(message)
        self.op_name = op_name
        self.operands = operands

    @property
    def devices(self) -> tuple[str, ...]:
        """The distinct devices, in the order of the operands."""
        return tuple(dict.fromkeys(operand.device for operand in self.operands))


# c10::impl::check_and_update_common_device, which torchgen writes into every CUDA wrapper without `device_check:
# NoCheck`.
STRICT = Rule(leave={})
# TensorIterator with allow_cpu_scalars(true): BinaryOps.cpp, PointwiseOps.cpp, Lerp.cpp.
ITERATOR = Rule(leave={}, default=Leave.CPU_SCALAR, is_iterator=True)
# CLAMP_CONFIG in TensorCompare.cpp: an iterator that does not allow them.
STRICT_ITERATOR = Rule(leave={}, is_iterator=True)

_FREE = Rule(leave={}, default=Leave.ANYWHERE)
# check_indices_on_cpu_or_selfdevice in TensorAdvancedIndexing.cpp.
_INDEX = Rule(
    leave={"indices": Leave.CPU},
    wording={"indices": "indices should be either on cpu or on the same device as the indexed tensor ({running})"},
)
# Newer releases move the indices of index_put from any device (expandTensors in IndexingUtils.h). The older rule
# is kept, so that a placement proven here runs on every release. Values: _index_put_impl_ moves a 0-dim one.
_INDEX_PUT = Rule(leave={"indices": Leave.CPU, "values": Leave.ANY_SCALAR}, is_iterator=True)
# masked_fill__cuda, fill_ and index_fill_ read the value with .item().
_MASKED_FILL = Rule(
    leave={"value": Leave.ANY_SCALAR},
    wording={"mask": "expected self and mask to be on the same device, but got mask on {other} and self on {running}"},
)
_ITEM_VALUE = Rule(leave={"value": Leave.ANY_SCALAR}, is_iterator=True)

# By operation, with its overload or without; with it goes first.
RULES: Mapping[str, Rule] = {
    "copy_": _FREE,
    "_to_copy": _FREE,
    "index": _INDEX,
    "_unsafe_index": _INDEX,
    "index_put_": _INDEX_PUT,
    "index_put": _INDEX_PUT,
    "_index_put_impl_": _INDEX_PUT,
    "masked_fill_": _MASKED_FILL,
    "masked_fill": _MASKED_FILL,
    "fill_": _ITEM_VALUE,
    "fill": _ITEM_VALUE,
    "index_fill_": _ITEM_VALUE,
    "index_fill": _ITEM_VALUE,
    # where_self_out in TensorCompare.cpp moves a 0-dim operand from wherever it is.
    "where": Rule(leave={"out": Leave.NOWHERE}, default=Leave.ANY_SCALAR, is_iterator=True),
    "clamp.Tensor": STRICT_ITERATOR,
    "clamp_.Tensor": STRICT_ITERATOR,
}

# Pointwise by their tag, yet without `device_check: NoCheck` in native_functions.yaml, so c10's check comes first.
CHECKED_POINTWISE = frozenset(
    "equal gcd gcd_ lcm lcm_ igamma igamma_ igammac igammac_ logaddexp logaddexp2 nextafter nextafter_ frexp "
    "native_dropout_backward gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward "
    "logit_backward".split()
)
# Iterators over several tensors that lack the tag.
UNTAGGED_ITERATORS = frozenset(
    "eq_ ne_ lt_ le_ gt_ ge_ floor_divide floor_divide_ rsub copysign_ heaviside_ mse_loss smooth_l1_loss "
    "__ilshift__ __irshift__".split()
)


def rule_for(name: str, overload_name: str, *, is_pointwise: bool) -> Rule:
    """The rule of one operation, such as `add` with the overload `Tensor`."""
    for known in (f"{name}.{overload_name}", name):
        if known in RULES:
            return RULES[known]
    if name in UNTAGGED_ITERATORS or (is_pointwise and name not in CHECKED_POINTWISE):
        return ITERATOR
    return STRICT


def running_device(rule: Rule, operands: Sequence[Operand]) -> str:
    """The device that the operation runs on."""
    if rule.is_iterator:
        return next((operand.device for operand in operands if operand.device != CPU), CPU)
    return operands[0].device


def may_leave(rule: Rule, operand: Operand) -> bool:
    """Whether `operand` may lie on another device than the one the operation runs on."""
    leave = rule.leave.get(operand.argument, rule.default)
    is_scalar = not operand.shape and not operand.is_written
    return (
        leave is Leave.ANYWHERE
        or (leave is Leave.CPU and operand.device == CPU)
        or (leave is Leave.CPU_SCALAR and operand.device == CPU and is_scalar)
        or (leave is Leave.ANY_SCALAR and is_scalar)
    )


def complaint(rule: Rule, operands: Sequence[Operand], kernel_name: str) -> str | None:
    """What CUDA would say against these operands, if anything; `kernel_name` is the wrapper that its message names."""
    running = running_device(rule, operands)
    strays = [operand for operand in operands if operand.device != running]
    refused = next((operand for operand in strays if not may_leave(rule, operand)), None)
    if refused is not None:
        return _words(rule, running, refused, kernel_name)
    # max_cpu_scalars_on_non_cpu in TensorIteratorBase::compute_types.
    if rule is ITERATOR and len(strays) > 1:
        return "Trying to pass too many CPU scalars to non-CPU kernel!"
    return None


def _words(rule: Rule, running: str, refused: Operand, kernel_name: str) -> str:
    own = (rule.wording or {}).get(refused.argument)
    if own is not None:
        return own.format(running=running, other=refused.device)
    common = f"found at least two devices, {running} and {refused.device}!"
    tail = f" (when checking argument for argument {refused.argument} in method {kernel_name})"
    return f"Expected all tensors to be on the same device, but {common}{'' if rule.is_iterator else tail}"
