"""Tensors without bytes: addresses that no allocation has, and templates of results laid out there.

A tensor is shape-only when its data pointer lies in a range of addresses that is reserved once and never written. So
it needs no class of its own, its views are shape-only too, and a stray read sees zeros. This file knows neither
devices nor operations.
"""

import ctypes
import mmap
from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np
import torch

from runtime.virtual.adapter import VirtualGpuUnavailableError

# Large enough for any model's largest tensor, small enough for the 47 address bits of a process.
RESERVED_BYTES = 1 << 43
# Where tensors may begin; from each of these addresses on, as much again is reserved.
_BEGIN_BYTES = RESERVED_BYTES // 2
# Address after address, so that code which tells storages apart by their pointer (accelerate's tied weights) still can.
_STEP_BYTES = 64

# Floating-point numbers that follow from real ones alone are kept up to this count: positions and frequencies, from
# which models derive indices. A table of 64 Ki numbers costs microseconds to compute.
SMALL_NUMEL = 2**16

_HOST = torch.device("cpu")
_META = torch.device("meta")
_serials = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressRange:
    """Reserved addresses `start` to `end`, as one host storage."""

    start: int
    end: int
    storage: torch.UntypedStorage


@cache
def reserved_addresses() -> AddressRange:
    """The process's range; reading it gives zeros, writing is a fault, and it takes no memory.

    Raises: VirtualGpuUnavailableError when the system grants no such range.
    """
    try:
        mapping = mmap.mmap(-1, RESERVED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    except OSError as error:
        raise VirtualGpuUnavailableError(
            f"shape-only virtual GPUs reserve {RESERVED_BYTES >> 40} TiB of addresses (no memory), and the system "
            f"refuses: {error}. Is there a limit such as `ulimit -v`?"
        ) from error
    start = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    buffer = (ctypes.c_uint8 * RESERVED_BYTES).from_address(start)
    # Python unmaps a mapping that it collects.
    buffer.mapping = mapping
    return AddressRange(
        start=start, end=start + RESERVED_BYTES, storage=torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    )


def next_address(addresses: AddressRange) -> int:
    """Where the next shape-only storage begins."""
    return addresses.start + next(_serials) * _STEP_BYTES % _BEGIN_BYTES


def is_shape_only(tensor: torch.Tensor, addresses: AddressRange) -> bool:
    """Whether `tensor` has a shape and no bytes. A tensor without elements has all the bytes it needs."""
    try:
        return addresses.start <= tensor.data_ptr() < addresses.end
    except RuntimeError:
        # `tensors.forget_values` was here.
        return True


def is_floating(dtype: torch.dtype) -> bool:
    """Whether numbers of this type have no bytes in shape-only mode; integers and booleans always have."""
    return dtype.is_floating_point or dtype.is_complex


class Template:
    """A result as it looks, to be made any number of times: a host tensor in the reserved range.

    `whole` stands for its storage where that is larger than what the tensor sees of it, as for a slice.
    """

    __slots__ = ("dtype", "is_floating", "num_bytes", "seen", "shape", "stride", "whole")

    def __init__(self, meta: torch.Tensor, addresses: AddressRange) -> None:
        """From a tensor, on the meta device or elsewhere, that looks the same."""
        self.shape, self.stride, self.dtype = meta.shape, meta.stride(), meta.dtype
        self.num_bytes = meta.untyped_storage().nbytes()
        if self.num_bytes > _BEGIN_BYTES:
            raise torch.OutOfMemoryError(
                f"a tensor of {self.num_bytes:,} bytes is more than shape-only virtual GPUs have addresses for "
                f"({_BEGIN_BYTES:,})"
            )
        self.is_floating = is_floating(meta.dtype)
        self.seen = _laid_out(meta.dtype, addresses, meta.shape, self.stride)
        self.whole: torch.Tensor | None = None
        offset = meta.storage_offset()
        if self.num_bytes != extent_bytes(meta.shape, self.stride, meta.element_size()):
            self.whole = _laid_out(meta.dtype, addresses, (self.num_bytes // meta.element_size(),), (1,))
            self.seen = _laid_out(meta.dtype, addresses, meta.shape, self.stride, offset)


def extent_bytes(shape: tuple[int, ...], stride: tuple[int, ...], element_bytes: int) -> int:
    """Bytes from the first element to the end of the last."""
    if 0 in shape:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))) * element_bytes


def _laid_out(
    dtype: torch.dtype, addresses: AddressRange, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=_HOST).set_(addresses.storage, offset, shape, stride)


def as_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same size, stride and dtype."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
