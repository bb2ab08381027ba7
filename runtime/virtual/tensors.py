"""Tensors between the host and virtual GPUs: host bytes become a `vgpu` tensor that the ledger counts, and back.

One storage is counted once however many views it has, for as long as any of them lives. It does not know operations.
"""

import torch

from runtime.virtual.adapter import metadata_kernel, negated_view, overload, relabelled
from runtime.virtual.ledger import Allocation
from runtime.virtual.process import PROCESS

_as_strided = metadata_kernel(overload("as_strided"))
_set_storage = metadata_kernel(overload("set_.source_Storage_storage_offset"))


class Block:
    """What stands behind one device storage: bytes on the host, counted on the device as long as the storage lives."""

    __slots__ = ("allocation", "host")

    def __init__(self, host: torch.UntypedStorage, allocation: Allocation) -> None:
        self.host = host
        self.allocation = allocation

    def clone(self) -> torch.UntypedStorage:
        """A device storage of its own with the same bytes."""
        copy = torch.empty(0, dtype=torch.uint8).set_(self.host.clone())
        return published(copy, self.allocation.index).untyped_storage()


def hosted(tensor: torch.Tensor) -> torch.Tensor:
    """The host tensor that shares a `vgpu` tensor's bytes and reads them alike."""
    host = relabelled(tensor, None)
    # Bits of the tensor, not of its bytes: DLPack does not carry them.
    if tensor.is_conj():
        host = host.conj()
    return negated_view(host) if tensor.is_neg() else host


def published(host: torch.Tensor, index: int) -> torch.Tensor:
    """`host`'s whole storage as a new storage on virtual GPU `index`, seen as `host` sees it.

    Raises: torch.OutOfMemoryError when the device has no room for it.
    """
    host_storage = host.untyped_storage()
    num_bytes = host_storage.nbytes()
    allocation = PROCESS.ledger.allocate(index, num_bytes)
    tensor = relabelled(host, index)
    storage = tensor.untyped_storage()
    if storage.nbytes() != num_bytes:
        whole = relabelled(torch.empty(0, dtype=host.dtype).set_(host_storage), index)
        storage = whole.untyped_storage()
        tensor = _as_strided(whole, host.size(), host.stride(), host.storage_offset())
    block = Block(host_storage, allocation)
    # An attribute of a storage lives exactly as long as the storage itself, whichever tensors share it.
    storage.vgpu_block = block
    # copy.deepcopy of a buffer calls it; torch's own crashes for want of a C++ allocator.
    storage.clone = block.clone
    return tensor


def rebind(tensor: torch.Tensor, host: torch.Tensor) -> None:
    """Let a `vgpu` tensor have the bytes and the shape of `host` from now on."""
    fresh = published(host, tensor.device.index)
    _set_storage(tensor, fresh.untyped_storage(), fresh.storage_offset(), fresh.size(), fresh.stride())
