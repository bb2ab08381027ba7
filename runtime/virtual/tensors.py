"""Tensors between the host and virtual GPUs: host bytes become a `vgpu` tensor that the ledger counts, and back.

One storage is counted once however many views it has, for as long as any of them lives. In shape-only mode a large
floating-point tensor gets no bytes, and is counted all the same. It does not know operations.
"""

import torch

from runtime.virtual.adapter import forbid_reading, metadata_kernel, negated_view, overload, relabelled
from runtime.virtual.ledger import Allocation
from runtime.virtual.process import PROCESS
from runtime.virtual.shapes import SMALL_NUMEL, Template, is_floating, next_address

_as_strided = metadata_kernel(overload("as_strided"))
_set_storage = metadata_kernel(overload("set_.source_Storage_storage_offset"))


class Block:
    """What stands behind a device storage: host bytes, or what none look like; counted as long as the storage lives."""

    __slots__ = ("allocation", "host")

    def __init__(self, host: torch.UntypedStorage | Template, allocation: Allocation) -> None:
        self.host = host
        self.allocation = allocation

    def clone(self) -> torch.UntypedStorage:
        """A device storage of its own with the same bytes."""
        index = self.allocation.index
        if isinstance(self.host, Template):
            return shape_only(self.host, index).untyped_storage()
        copy = torch.empty(0, dtype=torch.uint8, device="cpu").set_(self.host.clone())
        return published(copy, index).untyped_storage()


def hosted(tensor: torch.Tensor) -> torch.Tensor:
    """The host tensor that shares a `vgpu` tensor's bytes and reads them alike."""
    host = relabelled(tensor, None)
    # Bits of the tensor, not of its bytes: DLPack does not carry them.
    if tensor.is_conj():
        host = host.conj()
    return negated_view(host) if tensor.is_neg() else host


def published(host: torch.Tensor, index: int) -> torch.Tensor:
    """`host`'s whole storage as a new storage on virtual GPU `index`, seen as `host` sees it.

    In shape-only mode the bytes of many floating-point numbers are left behind.
    Raises: torch.OutOfMemoryError when the device has no room for it.
    """
    addresses = PROCESS.shape_only
    if addresses is not None and is_floating(host.dtype) and host.numel() > SMALL_NUMEL:
        return shape_only(Template(host, addresses), index)
    host_storage = host.untyped_storage()
    num_bytes = host_storage.nbytes()
    allocation = PROCESS.ledger.allocate(index, num_bytes)
    tensor = relabelled(host, index)
    if tensor.untyped_storage().nbytes() != num_bytes:
        whole = relabelled(torch.empty(0, dtype=host.dtype, device="cpu").set_(host_storage), index)
        tensor = _as_strided(whole, host.size(), host.stride(), host.storage_offset())
    _attach(Block(host_storage, allocation), tensor)
    return tensor


def shape_only(template: Template, index: int) -> torch.Tensor:
    """A tensor on virtual GPU `index` that looks like `template`, is counted like any other, and has no bytes.

    Raises: torch.OutOfMemoryError when the device has no room for it.
    """
    addresses = PROCESS.shape_only
    assert addresses is not None, "a template was made in shape-only mode"
    allocation = PROCESS.ledger.allocate(index, template.num_bytes)
    whole = template.whole
    if whole is None:
        tensor = relabelled(template.seen, index, next_address(addresses))
    else:
        seen = template.seen
        tensor = _as_strided(
            relabelled(whole, index, next_address(addresses)), seen.size(), seen.stride(), seen.storage_offset()
        )
    _attach(Block(template, allocation), tensor)
    return tensor


def forget_values(tensor: torch.Tensor) -> None:
    """Make a `vgpu` tensor shape-only that has bytes, and every view of it: something unknown is written into it."""
    storage = tensor.untyped_storage()
    looks = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
    assert PROCESS.shape_only is not None
    storage.vgpu_block.host = Template(looks, PROCESS.shape_only)
    forbid_reading(tensor)


def _attach(block: Block, tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    # An attribute of a storage lives exactly as long as the storage itself, whichever tensors share it.
    storage.vgpu_block = block
    # copy.deepcopy of a buffer calls it; torch's own crashes for want of a C++ allocator.
    storage.clone = block.clone


def rebind(tensor: torch.Tensor, fresh: torch.Tensor) -> None:
    """Let a `vgpu` tensor have the storage and the shape of `fresh`, on the same device, from now on."""
    _set_storage(tensor, fresh.untyped_storage(), fresh.storage_offset(), fresh.size(), fresh.stride())
