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
from runtime.virtual.agreement import agreed_device, rule_of
from runtime.virtual.process import PROCESS
from runtime.virtual.shape_kernels import META_KERNELS, ShapeKernel, copied
from runtime.virtual.shapes import SMALL_NUMEL, AddressRange, Template, is_floating, is_shape_only
from runtime.virtual.tensors import hosted, published, rebind, shape_only

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


@cache
def install_shape_only_kernels() -> None:
    """Let tensors of the meta device be copied to shape-only virtual GPUs."""
    adapter.install_meta_kernels(META_KERNELS)


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
    rule = rule_of(signature)
    results, num_tensors = signature.results, signature.num_tensors
    # Takes a Python number for a tensor, by the overload for scalars: `x % 3` arrives as remainder.Tensor(x, 3), and
    # only a number that stays one promotes and rounds as on the CPU.
    any_overload = op.overloadpacket

    def on_host(*args: Any, **kwargs: Any) -> Any:
        devices: list[torch.device] = []
        host_args = [_on_host(value, devices) for value in args]
        host_kwargs = {name: _on_host(value, devices) for name, value in kwargs.items()} if kwargs else kwargs
        device = devices[0]
        if devices.count(device) != len(devices):
            device = agreed_device(signature, rule, args, kwargs)
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

    return in_either_mode(op, signature, on_host)


def in_either_mode(op: Op, signature: Signature, on_host: Kernel) -> Kernel:
    """The kernel that heeds shape-only mode."""
    without_bytes = ShapeKernel(op, signature, on_host)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        addresses = PROCESS.shape_only
        return on_host(*args, **kwargs) if addresses is None else without_bytes(addresses, args, kwargs)

    return kernel


def any_other(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Operations of other libraries, such as torchvision's, run by their CPU kernels."""
    return computing_kernel(op)(*args, **kwargs)


def out_kernel(op: Op) -> Kernel:
    """A computing kernel whose `out` arguments may be empty: the result then takes their place.

    Torch's composed operations hand `empty(0)` to an out variant and expect it to be resized.
    """
    signature = adapter.signature_of(op)
    rule = rule_of(signature)
    into_given = computing_kernel(op)
    names = [argument.name for argument in signature.arguments if argument.is_out]

    def on_host(*args: Any, **kwargs: Any) -> Any:
        empty = {name: kwargs[name] for name in names if _is_replaceable(kwargs.get(name))}
        if not empty:
            return into_given(*args, **kwargs)
        devices: list[torch.device] = []
        host_args = [_on_host(value, devices) for value in args]
        host_kwargs = {name: _on_host(value, devices) for name, value in kwargs.items()}
        if devices.count(devices[0]) != len(devices):
            agreed_device(signature, rule, args, kwargs)
        fresh = {name: torch.empty(0, dtype=tensor.dtype, device=_HOST) for name, tensor in empty.items()}
        op(*host_args, **(host_kwargs | fresh))
        for name, tensor in empty.items():
            rebind(tensor, published(fresh[name], tensor.device.index))
        outs = tuple(kwargs[name] for name in names)
        result = outs if len(outs) > 1 else outs[0]
        if PROCESS.observer is not None:
            PROCESS.observer.ran(op, args, result)
        return result

    return in_either_mode(op, signature, on_host)


def factory_kernel(op: Op) -> Kernel:
    """A kernel that makes a tensor from no other."""
    may_be_huge = op.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided)

    def kernel(*args: Any, device: torch.device, pin_memory: bool | None = None, **kwargs: Any) -> torch.Tensor:
        index = PROCESS.checked_index(device)
        if may_be_huge:
            looks = op(*args, device=_META, **kwargs)
            PROCESS.ledger.check_room(index, looks.untyped_storage().nbytes())
            if PROCESS.shape_only is not None and is_floating(looks.dtype) and looks.numel() > SMALL_NUMEL:
                return shape_only(Template(looks, PROCESS.shape_only), index)
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
    if PROCESS.shape_only is not None and _copies_no_bytes(tensor, is_virtual, dtype, PROCESS.shape_only):
        result = copied(tensor, torch.device(DEVICE_TYPE, index) if is_virtual else target, dtype, memory_format)
    else:
        place = _HOST if is_virtual else target
        copy = torch.ops.aten._to_copy.default(
            hosted(tensor), dtype=dtype, layout=layout, device=place, memory_format=memory_format
        )
        result = published(copy, index) if is_virtual else copy
    if PROCESS.observer is not None and target != tensor.device:
        PROCESS.observer.copied(tensor, result)
    return result


def _copies_no_bytes(
    tensor: torch.Tensor, is_virtual: bool, dtype: torch.dtype | None, addresses: AddressRange
) -> bool:
    """Whether a copy is made of nothing, or would be dropped at once: many integers as floating-point numbers."""
    if is_shape_only(tensor, addresses):
        return True
    return is_virtual and tensor.numel() > SMALL_NUMEL and is_floating(dtype or tensor.dtype)


def resize_(tensor: torch.Tensor, size: list[int], *, memory_format: torch.memory_format | None = None) -> torch.Tensor:
    """Resize in place; a storage too small is replaced by a larger one, elements kept in order."""
    wanted = torch.empty(size, dtype=tensor.dtype, device=_META, memory_format=memory_format)
    needed_bytes = tensor.storage_offset() * tensor.element_size() + wanted.untyped_storage().nbytes()
    if needed_bytes <= tensor.untyped_storage().nbytes():
        return _resize_metadata(tensor, size, memory_format=memory_format)
    index = tensor.device.index
    if PROCESS.shape_only is not None and is_shape_only(tensor, PROCESS.shape_only):
        rebind(tensor, shape_only(Template(wanted, PROCESS.shape_only), index))
        return tensor
    old = hosted(_flat(tensor))
    new = torch.empty_strided(wanted.size(), wanted.stride(), dtype=tensor.dtype, device=_HOST)
    _flat(new)[: old.numel()].copy_(old)
    rebind(tensor, published(new, index))
    return tensor


_resize_metadata = adapter.metadata_kernel(adapter.overload("resize_"))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def histc(tensor: torch.Tensor, bins: int = 100, low: float = 0, high: float = 0) -> torch.Tensor:
    """CUDA's histogram, which counts integers too; the CPU's only counts floating-point numbers."""
    if PROCESS.shape_only is not None and is_shape_only(tensor, PROCESS.shape_only):
        looks = torch.empty(bins, dtype=tensor.dtype, device=_META)
        return shape_only(Template(looks, PROCESS.shape_only), tensor.device.index)
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
