"""Operations on tensors without bytes: results of the right size, counted on the device, and never computed.

An operation with a shape-only operand gets its result's looks from `shape_rules.py`; where the result is integers or
booleans its values come from `unknowns.py`. Any other operation runs on the host as it does without shape-only mode.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from runtime.virtual.adapter import DEVICE_TYPE, Kernel, Op, Signature, metadata_kernel, overload, signature_of
from runtime.virtual.agreement import agreed_device, rule_of
from runtime.virtual.process import PROCESS
from runtime.virtual.shape_rules import BY_VALUES, ShapeInference, describe, has_own_rules
from runtime.virtual.shapes import (
    SMALL_NUMEL,
    AddressRange,
    Template,
    as_meta,
    is_floating,
    is_shape_only,
)
from runtime.virtual.tensors import forget_values, hosted, published, rebind, shape_only
from runtime.virtual.unknowns import ShapeOnlyError, decided, record

# A row of logits of any vocabulary may be read on the host; all rows of a prompt are a mistake in a dry run.
HOST_NUMEL = 2**20
_AS_ZEROS = "unknown numbers are read on the host as 0.0"
_COMPARE_FIRST = "Compare them with a number first: a mask has values, by the rules in runtime/virtual/unknowns.py"
_FROM_META = "a meta tensor's integers are unknown: 0"

_HOST = torch.device("cpu")


class ShapeKernel:
    """What an operation does in shape-only mode; it leaves operands that all have bytes to `on_host`."""

    def __init__(self, op: Op, signature: Signature, on_host: Kernel) -> None:
        self._op, self._signature, self._on_host = op, signature, on_host
        self._name, self._results = signature.name, signature.results
        self._rule = rule_of(signature)
        self._infer = ShapeInference(op, signature)
        is_known = has_own_rules(op, signature)
        self._read = READ_ON_HOST.get(signature.name) if is_known else None
        self._by_values = BY_VALUES.get(signature.name) if is_known else None
        self._written = [
            argument.name if argument.is_keyword else position
            for position, argument in enumerate(signature.arguments)
            if argument.is_written
        ]
        self._may_skip = signature.is_pointwise and not self._written

    def __call__(self, addresses: AddressRange, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The operation's result."""
        key: list[Any] = []
        devices: list[torch.device] = []
        unknown = describe(args, key, devices, addresses)
        if kwargs:
            key += kwargs
            unknown |= describe(tuple(kwargs.values()), key, devices, addresses)
        if not unknown and not (self._may_skip and self._is_wasteful(tuple(key), args, kwargs, addresses)):
            return self._on_host(*args, **kwargs)
        device = devices[0]
        if devices.count(device) != len(devices):
            device = agreed_device(self._signature, self._rule, args, kwargs)
        if self._read is not None:
            result = self._read(self._name, *args)
        elif self._written:
            result = self._after_writing(self._outcome(key, args, kwargs, addresses), device, args, kwargs)
        else:
            result = self._made(self._outcome(key, args, kwargs, addresses), device, args, kwargs)
        if PROCESS.observer is not None:
            PROCESS.observer.ran(self._op, args, result)
        return result

    def _outcome(self, key: list[Any], args: Sequence[Any], kwargs: Mapping[str, Any], addresses: AddressRange) -> Any:
        if self._by_values is not None:
            args, key = self._by_values(args), [*kwargs.items()]
            describe(args, key, [], addresses)
        return self._infer(tuple(key), args, kwargs, addresses)

    def _is_wasteful(self, key: Any, args: Sequence[Any], kwargs: Mapping[str, Any], addresses: AddressRange) -> bool:
        """Whether numbers would be computed that nobody keeps: many floating-point ones, from many integers."""
        if not any(isinstance(value, torch.Tensor) and value.numel() > SMALL_NUMEL for value in args):
            return False
        outcome = self._infer(key, args, kwargs, addresses)
        return isinstance(outcome, Template) and outcome.is_floating and outcome.shape.numel() > SMALL_NUMEL

    def _made(self, outcome: Any, device: torch.device, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """New tensors on `device` where `outcome` has templates."""
        if type(outcome) is Template:
            if not outcome.is_floating:
                return placed(decided(self._name, args, kwargs, outcome.seen, PROCESS.decisions), device)
            if device.type == DEVICE_TYPE:
                return shape_only(outcome, device.index)
            return zeros_on_host(self._name, outcome.seen)
        if type(outcome) is list:
            made = [self._made(item, device, args, kwargs) for item in outcome]
            return made if self._results == (None,) else tuple(made)
        return outcome

    def _after_writing(self, outcome: Any, device: torch.device, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The results in the schema's order, of an operation that writes into arguments."""
        outcomes = outcome if len(self._results) > 1 else [outcome]
        matched = []
        for place, item in zip(self._results, outcomes, strict=False):
            if place is None:
                matched.append(self._made(item, device, args, kwargs))
                continue
            target = args[place] if isinstance(place, int) else kwargs[place]
            if type(item) is Template and item.shape != target.shape:
                # An out argument that was empty.
                rebind(target, self._made(item, target.device, args, kwargs))
            matched.append(target)
        for place in self._written:
            value = args[place] if isinstance(place, int) else kwargs.get(place)
            for target in value if isinstance(value, list | tuple) else (value,):
                if target is not None:
                    self._forget(target, args, kwargs)
        return tuple(matched) if len(matched) > 1 else matched[0] if matched else None

    def _forget(self, target: torch.Tensor, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Unknown numbers were written into `target`."""
        addresses = PROCESS.shape_only
        assert addresses is not None
        if is_shape_only(target, addresses) or not target.numel():
            return
        if not is_floating(target.dtype):
            hosted(target).copy_(decided(self._name, args, kwargs, target, PROCESS.decisions))
        elif target.device.type == DEVICE_TYPE:
            forget_values(target)
        else:
            target.copy_(zeros_on_host(self._name, target))


def placed(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor, or the virtual GPU's tensor with its values."""
    return published(host, device.index) if device.type == DEVICE_TYPE else host


def zeros_on_host(name: str, like: torch.Tensor) -> torch.Tensor:
    """What the host reads of unknown numbers.

    Raises: ShapeOnlyError when they are too many to be meant.
    """
    if like.numel() > HOST_NUMEL:
        raise ShapeOnlyError(
            name,
            f"{list(like.shape)} numbers are read on the host, and shape-only virtual GPUs have computed none of them",
            f"Keep the tensor on its device, read at most {HOST_NUMEL:,} of its numbers (they read as 0.0), or make "
            "virtual_gpus() without shape_only=True and a model of smaller sizes",
        )
    record(name, like.shape, _AS_ZEROS, PROCESS.decisions)
    return torch.zeros_like(like, device=_HOST)


# Operations whose result is for the host


def _number(name: str, tensor: torch.Tensor) -> Any:
    record(name, tensor.shape, _AS_ZEROS, PROCESS.decisions)
    return torch.zeros((), dtype=tensor.dtype, device=_HOST).item()


def _equal(name: str, tensor: torch.Tensor, other: torch.Tensor) -> bool:
    is_same = tensor is other
    record(name, tensor.shape, f"a tensor equals itself alone: {is_same}", PROCESS.decisions)
    return is_same


def _nonzero(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() > HOST_NUMEL:
        raise ShapeOnlyError(name, f"which of {list(tensor.shape)} numbers are zero is unknown", _COMPARE_FIRST)
    record(name, tensor.shape, "an unknown number is not zero", PROCESS.decisions)
    return placed(torch.ones(tensor.shape, dtype=torch.bool, device=_HOST).nonzero(), tensor.device)


READ_ON_HOST: Mapping[str, Callable[..., Any]] = {
    "_local_scalar_dense": _number,
    "equal": _equal,
    "nonzero": _nonzero,
}


# Copies

_COPY = overload("_to_copy")
_infer_copy = ShapeInference(_COPY, signature_of(_COPY))


def copied(
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> torch.Tensor:
    """A shape-only tensor's copy on any device, or as another dtype."""
    addresses = PROCESS.shape_only
    assert addresses is not None
    options = {"dtype": dtype, "memory_format": memory_format}
    key = (tensor.shape, tensor.stride(), tensor.dtype, dtype, memory_format)
    looks = _infer_copy(key, (tensor,), options, addresses)
    if device.type == DEVICE_TYPE and looks.is_floating:
        return shape_only(looks, device.index)
    if device.type == "meta":
        return as_meta(looks.seen)
    if looks.is_floating:
        return zeros_on_host("_to_copy", looks.seen)
    return placed(decided("_to_copy", (tensor,), options, looks.seen, PROCESS.decisions), device)


# From the meta device

_to_copy_of_torch = metadata_kernel(overload("_to_copy"))
_copy_of_torch = metadata_kernel(overload("copy_"))
_may_become_of_torch = metadata_kernel(overload("_has_compatible_shallow_copy_type"))


def _is_shape_only_mode(device: torch.device | None) -> bool:
    return PROCESS.shape_only is not None and device is not None and device.type == DEVICE_TYPE


def from_meta(tensor: torch.Tensor, *, device: torch.device | None = None, **options: Any) -> torch.Tensor:
    """A meta tensor's copy; on a shape-only virtual GPU too, which torch refuses for want of data."""
    if device is None or not _is_shape_only_mode(device):
        return _to_copy_of_torch(tensor, device=device, **options)
    options.pop("pin_memory", None), options.pop("non_blocking", None)
    addresses, index = PROCESS.shape_only, PROCESS.checked_index(device)
    assert addresses is not None
    looks = Template(_to_copy_of_torch(tensor, **options), addresses)
    if looks.is_floating:
        return shape_only(looks, index)
    record("_to_copy", looks.shape, _FROM_META, PROCESS.decisions)
    return published(torch.zeros_like(looks.seen), index)


def copied_from_meta(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`target.copy_(source)` with either on the meta device."""
    if not _is_shape_only_mode(target.device) or source.device.type != "meta":
        return _copy_of_torch(target, source, non_blocking)
    addresses = PROCESS.shape_only
    assert addresses is not None
    # Whether they fit each other.
    _copy_of_torch(as_meta(target), source)
    if not is_floating(target.dtype):
        record("copy_", target.shape, _FROM_META, PROCESS.decisions)
        hosted(target).zero_()
    elif not is_shape_only(target, addresses):
        forget_values(target)
    return target


def may_become_from_meta(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether `tensor.data = other` is possible with either on the meta device: a meta parameter may get no bytes."""
    if _is_shape_only_mode(other.device):
        return tensor.layout == other.layout == torch.strided
    return bool(_may_become_of_torch(tensor, other))


META_KERNELS: Mapping[str, Kernel] = {
    "_to_copy": from_meta,
    "copy_": copied_from_meta,
    "_has_compatible_shallow_copy_type": may_become_from_meta,
}
