"""The way in: make virtual GPUs of given capacities, and read what is alive on them."""

import gc
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from runtime.virtual import device_module
from runtime.virtual.adapter import DEVICE_TYPE, claim_device_type
from runtime.virtual.kernels import install_all_kernels, install_shape_only_kernels
from runtime.virtual.ledger import BLOCK_BYTES, MemoryLedger, readable_bytes
from runtime.virtual.process import PROCESS
from runtime.virtual.shapes import reserved_addresses
from runtime.virtual.unknowns import Decision

# c10::DeviceIndex is an int8: index 128 wraps to a negative one without an error.
MAX_DEVICES = 128


class VirtualGpus:
    """Virtual GPUs of this process: `.devices` to place tensors on, `.ledger` to see what is alive there.

    Computations run on the CPU: values are real, speed is not, and memory that a real kernel takes as workspace
    while it runs is not counted.

    In shape-only mode values are not real either: `.decisions` counts how often one that nobody knows was decided by
    a rule, and at which line of model code.

    Device maps of transformers and accelerate work as with real GPUs, whether they say 1, "vgpu:1" or torch.device.
    From the first set on, torch's current accelerator is `vgpu` in this process, and with it any bare integer such
    as `.to(0)`, even where there are real GPUs: a process that also drives those makes its dry runs in a child.
    """

    def __init__(self, ledger: MemoryLedger, decisions: Mapping[Decision, int], *, is_shape_only: bool) -> None:
        self.ledger = ledger
        self.decisions = decisions
        self.is_shape_only = is_shape_only
        self.devices = tuple(torch.device(DEVICE_TYPE, index) for index in range(ledger.num_devices))

    @property
    def num_devices(self) -> int:
        """How many there are."""
        return self.ledger.num_devices

    def describe(self) -> str:
        """One line per device: what is alive, what it holds, and that it is not a real one."""
        how = "nothing is computed" if self.is_shape_only else "computations run on the CPU"
        title = f"{self.num_devices} virtual GPUs: {how}, only placement and memory are modelled"
        lines = [title]
        for index, device in enumerate(self.devices):
            alive, peak, capacity = (
                readable_bytes(count(index))
                for count in (self.ledger.allocated_bytes, self.ledger.peak_bytes, self.ledger.capacity_bytes)
            )
            lines.append(f"{device}: {alive} alive, peak {peak}, capacity {capacity}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        sizes = ", ".join(readable_bytes(self.ledger.capacity_bytes(index)) for index in range(self.num_devices))
        return f"<{self.num_devices} virtual GPU(s) of {sizes}>"


def virtual_gpus(
    capacities_bytes: Sequence[int], *, shape_only: bool = False, block_bytes: int = BLOCK_BYTES
) -> VirtualGpus:
    """Make the virtual GPUs of this process anew, one per capacity; every tensor takes whole blocks there.

    With `shape_only` floating-point tensors there have sizes and no bytes, so that a model of any size runs in no
    memory and about the time its Python takes. Integers and booleans, and floating-point numbers that follow from
    them in small numbers, stay real. Values that follow from unknown ones are decided by rules: see `.decisions`.
    Raises: ValueError for no device, too many, or a capacity below 1. RuntimeError while tensors live on the
    devices made before. VirtualGpuUnavailableError when torch cannot have them in this process.
    """
    if not 1 <= len(capacities_bytes) <= MAX_DEVICES:
        raise ValueError(f"expected 1 to {MAX_DEVICES} capacities, got {len(capacities_bytes)}")
    if min(capacities_bytes) < 1:
        raise ValueError(f"a capacity is a positive number of bytes, got {list(capacities_bytes)}")
    _refuse_while_in_use(PROCESS.ledger)
    if claim_device_type(device_module):
        install_all_kernels()
    if shape_only:
        install_shape_only_kernels()
    PROCESS.shape_only = reserved_addresses() if shape_only else None
    PROCESS.decisions = Counter()
    PROCESS.ledger = MemoryLedger(capacities_bytes, block_bytes)
    return VirtualGpus(PROCESS.ledger, PROCESS.decisions, is_shape_only=shape_only)


def _refuse_while_in_use(ledger: MemoryLedger) -> None:
    if any(_alive_bytes(ledger)):
        # A model under accelerate's hooks refers to itself: only the collector ends its life.
        gc.collect()
        for let_go in PROCESS.caches.values():
            let_go()
    alive = _alive_bytes(ledger)
    if any(alive):
        held = ", ".join(
            f"{DEVICE_TYPE}:{index} {num_bytes:,} bytes" for index, num_bytes in enumerate(alive) if num_bytes
        )
        raise RuntimeError(f"tensors are still alive on the virtual GPUs made before: {held}; delete them first")


def _alive_bytes(ledger: MemoryLedger) -> list[int]:
    return [ledger.allocated_bytes(index) for index in range(ledger.num_devices)]
