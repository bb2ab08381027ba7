"""Every ATen operation on virtual GPUs: check where operands lie, run on the host, put results on the device.

Operations that torch composes of others are left to torch, so a virtual GPU sees the kernels that CUDA would see;
a few are taken whole, because torch composes them differently for this key than for the CPU or CUDA. What a
kernel takes while it runs is not counted, only what it returns.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from runtime.virtual import adapter
from runtime.virtual.adapter import DEVICE_TYPE, Kernel, Op, Signature
from runtime.virtual.process import PROCESS
from runtime.virtual.rules import DeviceMismatchError, Operand, Rule, complaint, rule_for, running_device
from runtime.virtual.tensors import hosted, published, rebind

_HOST = torch.device("cpu")
_META = torch.device("meta")

# Composed by torch, and taken whole here.
WHOLE = (
    # One fused kernel on CUDA, without (T, T) scores in memory. Composed, it would also differ in the last bits.
    "scaled_dot_product_attention",
    # _fused_rms_norm on CUDA.
    "rms_norm",
    # With dtype=float32 on 16-bit input CUDA does not materialise the widened input.
    "softmax.int",
    "log_softmax.int",
    # These select an implementation by device type.
    "convolution",
    "_convolution",
    "_grouped_mm",
    "lstm.input",
    "gru.input",
    "lstm_cell",
    "gru_cell",
)
# Composed by torch for this key only: one kernel instead of two or three.
DIRECT = ("clone", "copy_")
# Read and write no element: the CPU's kernels serve as they are.
METADATA = (
    "as_strided",
    "view",
    "_reshape_alias",
    "view_as_real",
    "view_as_complex",
    "unfold",
    "set_",
    "set_.source_Tensor",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
)


def install_all_kernels() -> None:
    """Register a kernel for every operation that needs one; about 0.1 s."""
    kernels = {_full_name(op): _kernel_for(op) for op in adapter.cpu_operations()}
    kernels |= {name: computing_kernel(adapter.overload(name), is_whole=True) for name in WHOLE}
    kernels |= {name: computing_kernel(adapter.overload(name)) for name in DIRECT}
    kernels |= {name: adapter.metadata_kernel(adapter.overload(name)) for name in METADATA}
    kernels |= {"_to_copy": to_copy, "resize_": resize_, "histc": histc}
    kernels |= {"_has_compatible_shallow_copy_type": may_become}
    adapter.install_kernels(kernels, any_other)


def _full_name(op: Op) -> str:
    return op.name().removeprefix("aten::")


def _kernel_for(op: Op) -> Kernel:
    arguments = adapter.signature_of(op).arguments
    if not any(argument.is_tensor for argument in arguments):
        return factory_kernel(op)
    if any(argument.is_out for argument in arguments):
        return out_kernel(op)
    return computing_kernel(op)


@cache
def computing_kernel(op: Op, *, is_whole: bool = False) -> Kernel:
    """A kernel that runs `op` on the host.

    `is_whole`: torch composes `op` on the host, and may choose by what asks for gradients, so the host is told.
    """
    signature = adapter.signature_of(op)
    rule = _rule_of(signature)
    results, num_tensors = signature.results, signature.num_tensors
    # Takes a Python number for a tensor, by the overload for scalars: `x % 3` arrives as remainder.Tensor(x, 3), and
    # only a number that stays one promotes and rounds as on the CPU.
    any_overload = op.overloadpacket

    def kernel(*args: Any, **kwargs: Any) -> Any:
        devices: list[torch.device] = []
        host_args = [_on_host(value, devices) for value in args]
        host_kwargs = {name: _on_host(value, devices) for name, value in kwargs.items()} if kwargs else kwargs
        device = devices[0]
        if devices.count(device) != len(devices):
            device = _agreed_device(signature, rule, args, kwargs)
        if is_whole:
            _ask_gradients(args, host_args)
        run = op if len(devices) >= num_tensors else any_overload
        outcome = run(*host_args, **host_kwargs)
        if is_whole:
            outcome = _detached(outcome)
        result = _on_device(outcome, device) if results == (None,) else _matched(results, outcome, device, args, kwargs)
        if PROCESS.observer is not None:
            PROCESS.observer.ran(op, args, result)
        return result

    return kernel


def any_other(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Operations of other libraries, such as torchvision's, run by their CPU kernels."""
    return computing_kernel(op)(*args, **kwargs)


def out_kernel(op: Op) -> Kernel:
    """A computing kernel whose `out` arguments may be empty: the result then takes their place.

    Torch's composed operations hand `empty(0)` to an out variant and expect it to be resized.
    """
    signature = adapter.signature_of(op)
    rule = _rule_of(signature)
    into_given = computing_kernel(op)
    names = [argument.name for argument in signature.arguments if argument.is_out]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        empty = {name: kwargs[name] for name in names if _is_replaceable(kwargs.get(name))}
        if not empty:
            return into_given(*args, **kwargs)
        devices: list[torch.device] = []
        host_args = [_on_host(value, devices) for value in args]
        host_kwargs = {name: _on_host(value, devices) for name, value in kwargs.items()}
        if devices.count(devices[0]) != len(devices):
            _agreed_device(signature, rule, args, kwargs)
        fresh = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in empty.items()}
        op(*host_args, **(host_kwargs | fresh))
        for name, tensor in empty.items():
            rebind(tensor, fresh[name])
        outs = tuple(kwargs[name] for name in names)
        return outs if len(outs) > 1 else outs[0]

    return kernel


def factory_kernel(op: Op) -> Kernel:
    """A kernel that makes a tensor from no other."""
    may_be_huge = op.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided)

    def kernel(*args: Any, device: torch.device, pin_memory: bool | None = None, **kwargs: Any) -> torch.Tensor:
        index = PROCESS.checked_index(device)
        if may_be_huge:
            shape_only = op(*args, device=_META, **kwargs)
            PROCESS.ledger.check_room(index, shape_only.untyped_storage().nbytes())
        return published(op(*args, device=_HOST, **kwargs), index)

    return kernel


def to_copy(
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """A copy of a `vgpu` tensor, to any device.

    Pinned memory and asynchrony are ignored: torch would ask the backend for a pinned allocator.
    """
    target = tensor.device if device is None else device
    is_virtual = target.type == DEVICE_TYPE
    index = PROCESS.checked_index(target) if is_virtual else 0
    place = _HOST if is_virtual else target
    copy = torch.ops.aten._to_copy.default(
        hosted(tensor), dtype=dtype, layout=layout, device=place, memory_format=memory_format
    )
    result = published(copy, index) if is_virtual else copy
    if PROCESS.observer is not None and target != tensor.device:
        PROCESS.observer.copied(tensor, result)
    return result


def resize_(tensor: torch.Tensor, size: list[int], *, memory_format: torch.memory_format | None = None) -> torch.Tensor:
    """Resize in place; a storage too small is replaced by a larger one, elements kept in order."""
    wanted = torch.empty(size, dtype=tensor.dtype, device=_META, memory_format=memory_format)
    needed_bytes = tensor.storage_offset() * tensor.element_size() + wanted.untyped_storage().nbytes()
    if needed_bytes <= tensor.untyped_storage().nbytes():
        return _resize_metadata(tensor, size, memory_format=memory_format)
    old = hosted(_flat(tensor))
    new = torch.empty_strided(wanted.size(), wanted.stride(), dtype=tensor.dtype)
    _flat(new)[: old.numel()].copy_(old)
    rebind(tensor, new)
    return tensor


_resize_metadata = adapter.metadata_kernel(adapter.overload("resize_"))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def histc(tensor: torch.Tensor, bins: int = 100, low: float = 0, high: float = 0) -> torch.Tensor:
    """CUDA's histogram, which counts integers too; the CPU's only counts floating-point numbers."""
    host = hosted(tensor)
    countable = host if host.is_floating_point() else host.double()
    return published(torch.histc(countable, bins, low, high).to(host.dtype), tensor.device.index)


def may_become(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether `tensor.data = other` is possible: between the CPU and virtual GPUs, as between the CPU and CUDA.

    Torch's list of such devices lacks PrivateUse1. Without it `module.to` makes new parameters, and unties tied ones.
    """
    return tensor.layout == other.layout == torch.strided


def _on_host(value: Any, devices: list[torch.device]) -> Any:
    if isinstance(value, torch.Tensor):
        device = value.device
        devices.append(device)
        return hosted(value) if device.type == DEVICE_TYPE else value
    if type(value) is list or type(value) is tuple:
        return [_on_host(item, devices) for item in value]
    return value


def _ask_gradients(values: Sequence[Any], host_values: Sequence[Any]) -> None:
    for value, host_value in zip(values, host_values, strict=True):
        if isinstance(value, torch.Tensor):
            host_value.requires_grad_(value.requires_grad)
        elif type(value) is list or type(value) is tuple:
            _ask_gradients(value, host_value)


def _detached(outcome: Any) -> Any:
    """The results without the host's graph, which would keep the operands alive."""
    return outcome.detach() if isinstance(outcome, torch.Tensor) else tuple(value.detach() for value in outcome)


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return published(value, device.index) if device.type == DEVICE_TYPE else value
    if type(value) is list or type(value) is tuple:
        return [_on_device(item, device) for item in value]
    return value


def _matched(
    results: tuple[int | str | None, ...], outcome: Any, device: torch.device, args: Any, kwargs: Mapping[str, Any]
) -> Any:
    """The results in the schema's order: arguments written to are themselves, new tensors go to `device`."""
    if not results:
        return None
    outcomes = outcome if len(results) > 1 else (outcome,)
    matched = []
    for place, value in zip(results, outcomes, strict=True):
        written = args[place] if isinstance(place, int) else kwargs.get(place or "")
        matched.append(_on_device(value, device) if place is None else written)
    return tuple(matched) if len(matched) > 1 else matched[0]


def _is_replaceable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 0 and value.device.type == DEVICE_TYPE


def _agreed_device(signature: Signature, rule: Rule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where an operation whose operands lie on several devices runs.

    Raises: DeviceMismatchError when CUDA would refuse them.
    """
    operands = _operands(signature, args, kwargs)
    message = complaint(rule, operands, wrapper_name(signature))
    if message is not None:
        problem = DeviceMismatchError(message, op_name=signature.name, operands=tuple(operands))
        if PROCESS.observer is None:
            raise problem
        PROCESS.observer.mismatched(problem, _tensors(args, kwargs))
    return torch.device(running_device(rule, operands))


def _rule_of(signature: Signature) -> Rule:
    return rule_for(signature.name, signature.overload_name, is_pointwise=signature.is_pointwise)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    values = [*args, *kwargs.values()]
    nested = [item for value in values for item in (value if isinstance(value, list | tuple) else (value,))]
    return [value for value in nested if isinstance(value, torch.Tensor)]


def _operands(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Operand]:
    operands = []
    for position, argument in enumerate(signature.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                shape = tuple(tensor.shape)
                operand = Operand(
                    argument=argument.name, device=str(tensor.device), shape=shape, is_written=argument.is_written
                )
                operands.append(operand)
    return operands


def wrapper_name(signature: Signature) -> str:
    """The function that CUDA's message would name, with our device type: `wrapper_vgpu_cat`.

    Source: torchgen/dest/register_dispatch_key.py; a structured kernel is named by the operation and then its
    overload, any other by its overload first, which is empty for most.
    """
    if not signature.is_structured:
        return f"wrapper_{DEVICE_TYPE}_{signature.overload_name}_{signature.name}"
    overload_name = f"_{signature.overload_name}" if signature.overload_name else ""
    return f"wrapper_{DEVICE_TYPE}_{signature.name}{overload_name}"
