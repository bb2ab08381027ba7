"""The one file that touches torch's private API: it makes `vgpu` a device type and moves labels, not bytes.

A tensor on a virtual GPU is an ordinary `torch.Tensor`, no subclass: same strides, same bytes in host memory,
only its device says `vgpu:1`. So no dispatch mode has to be active, `nn.Parameter` and `module.to` are torch's
own, and every operation reaches the Python kernels registered here for the PrivateUse1 key. This file knows
neither the kernels nor the ledger.
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any, cast

import torch
from torch.utils import _python_dispatch

DEVICE_TYPE = "vgpu"
Op = torch._ops.OpOverload
Kernel = Callable[..., Any]
TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""For those that watch every operation, whatever the device."""

_KEY = "PrivateUse1"
# Torch's name for the key while nobody has claimed it.
_UNCLAIMED = "privateuseone"
_NEEDED = ("_to_dlpack", "_from_dlpack", "_dispatch_get_all_op_names", "_dispatch_has_kernel_for_dispatch_key")

# DLDeviceType in dlpack.h; torch maps kDLExtDev to the PrivateUse1 key.
_DLPACK_CPU = 1
_DLPACK_EXTENSION = 12
# struct DLTensor { void* data; struct { int32_t type; int32_t index; } device; ... }, first member of
# DLManagedTensor.
_DLPACK_DEVICE_OFFSET = ctypes.sizeof(ctypes.c_void_p)

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_device_field_at = ctypes.c_int64.from_address
_data_field_at = ctypes.c_size_t.from_address

# A torch.library.Library takes its registrations back when it is collected.
_libraries: list[torch.library.Library] = []


class VirtualGpuUnavailableError(RuntimeError):
    """This process cannot have virtual GPUs: torch lacks what they need, or another backend owns PrivateUse1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of an operation's schema."""

    name: str
    is_tensor: bool
    is_written: bool
    is_out: bool
    is_keyword: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a kernel needs to know of an operation, read once from its schema.

    `results` says per result which argument it is, by position or by name, or None for a new tensor.
    `num_tensors` counts the arguments that must be tensors: fewer are seen when torch passes a Python number for
    one.
    """

    name: str
    overload_name: str
    arguments: tuple[Argument, ...]
    results: tuple[int | str | None, ...]
    num_tensors: int
    is_pointwise: bool
    is_structured: bool


def claim_device_type(device_module: ModuleType) -> bool:
    """Register `vgpu` with `device_module` as `torch.vgpu`; False when this process has done so before.

    Raises: VirtualGpuUnavailableError when the key belongs to another backend, or torch lacks what this needs.
    """
    owner = torch._C._get_privateuse1_backend_name()
    if owner == DEVICE_TYPE and getattr(torch, DEVICE_TYPE, None) is device_module:
        return False
    if owner != _UNCLAIMED:
        raise VirtualGpuUnavailableError(
            f"virtual GPUs need torch's PrivateUse1 key, and the backend {owner!r} owns it in this process: "
            "run them in a child process that does not load that backend"
        )
    backend_setup()(DEVICE_TYPE, device_module)
    for name in ("new_tensor", "new"):
        setattr(torch.Tensor, name, _on_own_device(getattr(torch.Tensor, name)))
    return True


def backend_setup(backend_registration: ModuleType = torch.utils.backend_registration) -> Callable[..., None]:
    """Torch's function that makes PrivateUse1 a Python-only backend.

    Raises: VirtualGpuUnavailableError when this torch does not have it, or lacks another private function used here.
    """
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    missing = [name for name in _NEEDED if not hasattr(torch._C, name)]
    if setup is None:
        missing.append("torch.utils.backend_registration._setup_privateuseone_for_python_backend")
    if setup is None or missing:
        raise VirtualGpuUnavailableError(
            f"torch {torch.__version__} lacks {', '.join(missing)}, which virtual GPUs need; torch 2.13 has it"
        )
    return cast("Callable[..., None]", setup)


def _on_own_device(method: Kernel) -> Kernel:
    """`Tensor.new_tensor` or `Tensor.new`, on the tensor's device.

    Torch places their result on the current device, after making the tensor's device the current one. A backend
    written in Python has no say in the latter (torch/csrc/acc/Module.cpp), so they would all land on `vgpu:0`.
    """

    @wraps(method)
    def placed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.device.type == DEVICE_TYPE and kwargs.get("device") is None:
            kwargs["device"] = tensor.device
        return method(tensor, *args, **kwargs)

    return placed


def relabelled(tensor: torch.Tensor, index: int | None, address: int | None = None) -> torch.Tensor:
    """The same bytes as a tensor of virtual GPU `index`, or of the CPU when it is None; about one microsecond.

    The result keeps `tensor`'s storage alive. Its own storage begins at `tensor`'s first element and ends at its
    last. With `address` it begins there instead, which nobody may read.
    """
    capsule = torch._C._to_dlpack(tensor)
    label = _DLPACK_CPU if index is None else _DLPACK_EXTENSION | index << 32
    pointer = _capsule_pointer(capsule, b"dltensor")
    _device_field_at(pointer + _DLPACK_DEVICE_OFFSET).value = label
    if address is not None:
        _data_field_at(pointer).value = address
    return torch._C._from_dlpack(capsule)


def forbid_reading(tensor: torch.Tensor) -> None:
    """Let `data_ptr()` of every tensor on this storage raise RuntimeError from now on."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose elements read as negated, as the imaginary part of a conjugate does."""
    return torch._neg_view(tensor)


def suggested_memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """The layout that ATen's convolutions take a tensor to be in, by its strides alone."""
    return torch._prims_common.suggest_memory_format(tensor)


def metadata_kernel(op: Op) -> Kernel:
    """The CPU's kernel of an operation, to be run as it is on tensors of other devices.

    For operations that read and write no element, and those that torch implements alike for every device.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    redispatch = op._handle.redispatch_boxed

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return redispatch(keys, *args, **kwargs)

    return kernel


def cpu_operations() -> Iterable[Op]:
    """Every ATen operation with a kernel of its own for the CPU: what a device backend has to bring too."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            yield overload(name.removeprefix("aten::"))


def overload(name: str) -> Op:
    """The ATen operation called `name`, such as `add.Tensor` or `cat`."""
    base, _, overload_name = name.partition(".")
    return cast("Op", getattr(getattr(torch.ops.aten, base), overload_name or "default"))


def signature_of(op: Op) -> Signature:
    """`op`'s schema as a value."""
    schema = op._schema
    places: dict[frozenset[str], int | str] = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            places[frozenset(argument.alias_info.before_set)] = argument.name if argument.kwarg_only else position
    results = tuple(
        None if result.alias_info is None else places.get(frozenset(result.alias_info.before_set))
        for result in schema.returns
    )
    return Signature(
        name=schema.name.partition("::")[2],
        overload_name=schema.overload_name,
        arguments=tuple(_argument(argument) for argument in schema.arguments),
        results=results,
        num_tensors=sum(str(argument.type) == "Tensor" for argument in schema.arguments),
        is_pointwise=torch.Tag.pointwise in op.tags,
        is_structured=torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), "CompositeExplicitAutogradNonFunctional"
        ),
    )


def _argument(argument: Any) -> Argument:
    return Argument(
        name=argument.name,
        is_tensor="Tensor" in str(argument.type),
        is_written=argument.alias_info is not None and argument.alias_info.is_write,
        is_out=argument.is_out,
        is_keyword=argument.kwarg_only,
    )


def install_kernels(kernels: Mapping[str, Kernel], fallback: Kernel) -> None:
    """Let ATen operations on `vgpu` tensors run `kernels`, by name, and any other operation `fallback(op, ...)`."""
    aten = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        aten.impl(name, kernel, _KEY)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(fallback, _KEY)
    _libraries.extend((aten, everything))


def install_meta_kernels(kernels: Mapping[str, Kernel]) -> None:
    """Let ATen operations with an operand on the meta device run `kernels`, by name."""
    aten = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        # Library.impl refuses this key for operations that torch composes; its own callee does not.
        aten.m.impl(name, "Meta", kernel, False)
    _libraries.append(aten)
