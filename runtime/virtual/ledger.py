"""Bytes alive on each virtual GPU: what is allocated, the peak, and the refusal when a device is full.

It counts what is announced to it, rounded as CUDA's caching allocator rounds. It does not know tensors,
fragmentation, the CUDA context, or the workspace that a real kernel would take while it runs.
"""

import threading
from collections.abc import Sequence

import torch

# kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp: every block is rounded up to a multiple of it.
BLOCK_BYTES = 512


class MemoryLedger:
    """Bytes alive, peak and capacity per device index.

    `block_bytes` is what sizes are rounded up to; 1 keeps them exact. `growth` is None, or a list that gets the device
    and the bytes alive there after each allocation.
    Safe from several threads; a storage may die in any of them.
    """

    def __init__(self, capacities_bytes: Sequence[int], block_bytes: int = BLOCK_BYTES) -> None:
        self._capacities = tuple(capacities_bytes)
        self._block_bytes = block_bytes
        self._num_allocations = 0
        self.growth: list[tuple[int, int]] | None = None
        self._allocated = [0] * len(self._capacities)
        self._peaks = [0] * len(self._capacities)
        # Re-entrant, because a storage may die, and call back, while this thread holds it.
        self._lock = threading.RLock()

    @property
    def num_devices(self) -> int:
        """How many devices are counted."""
        return len(self._capacities)

    def capacity_bytes(self, index: int) -> int:
        """Bytes that the device holds."""
        return self._capacities[index]

    def allocated_bytes(self, index: int) -> int:
        """Bytes alive now, in whole blocks."""
        return self._allocated[index]

    def peak_bytes(self, index: int) -> int:
        """The most bytes alive at once since the start or the last `reset_peak`."""
        return self._peaks[index]

    def free_bytes(self, index: int) -> int:
        """Bytes that may still be allocated."""
        return self._capacities[index] - self._allocated[index]

    def reset_peak(self) -> None:
        """Let every device's peak start again at what is alive now."""
        with self._lock:
            self._peaks[:] = self._allocated

    def check_room(self, index: int, num_bytes: int) -> None:
        """Raise `torch.OutOfMemoryError` when `num_bytes` more would not fit, so that no host memory is taken first."""
        if blocks_bytes(num_bytes, self._block_bytes) > self.free_bytes(index):
            raise torch.OutOfMemoryError(self._refusal(index, num_bytes))

    def allocate(self, index: int, num_bytes: int) -> "Allocation":
        """Count `num_bytes` on a device for as long as the returned object lives."""
        rounded = blocks_bytes(num_bytes, self._block_bytes)
        with self._lock:
            allocated = self._allocated[index] + rounded
            if allocated > self._capacities[index]:
                raise torch.OutOfMemoryError(self._refusal(index, num_bytes))
            self._allocated[index] = allocated
            self._num_allocations += 1
            if self.growth is not None:
                self.growth.append((index, allocated))
            if allocated > self._peaks[index]:
                self._peaks[index] = allocated
            return Allocation(self, index, rounded, self._num_allocations)

    def release(self, index: int, rounded_bytes: int) -> None:
        """Take back what an allocation counted."""
        with self._lock:
            self._allocated[index] -= rounded_bytes

    def _refusal(self, index: int, num_bytes: int) -> str:
        return (
            f"vgpu out of memory. Tried to allocate {readable_bytes(num_bytes)}. vgpu:{index} has a total capacity of "
            f"{readable_bytes(self._capacities[index])} of which {readable_bytes(self.free_bytes(index))} is free. "
            f"Of the allocated memory {readable_bytes(self._allocated[index])} is held by tensors, in blocks of "
            f"{self._block_bytes} bytes. This is a virtual GPU: its capacity is the number given to virtual_gpus()."
        )


class Allocation:
    """Bytes counted on a device until this object dies; `serial` numbers the ledger's allocations."""

    __slots__ = ("_ledger", "index", "num_bytes", "serial")

    def __init__(self, ledger: MemoryLedger, index: int, num_bytes: int, serial: int) -> None:
        self._ledger = ledger
        self.index = index
        self.num_bytes = num_bytes
        self.serial = serial

    def __del__(self) -> None:
        self._ledger.release(self.index, self.num_bytes)


def blocks_bytes(num_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """`num_bytes` in whole blocks."""
    return -(-num_bytes // block_bytes) * block_bytes


def readable_bytes(num_bytes: int) -> str:
    """A size as CUDA's allocator prints it.

    Source: format_size in c10/cuda/CUDACachingAllocator.cpp.
    """
    for unit_bytes, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.2f} {name}"
    return f"{num_bytes} bytes"
