"""The set of virtual GPUs that this process has now: one for all threads, as with real devices.

It only remembers; `devices.py` decides when the set may change.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from runtime.virtual.ledger import MemoryLedger
from runtime.virtual.rules import DeviceMismatchError
from runtime.virtual.shapes import AddressRange
from runtime.virtual.unknowns import Decision


class Observer(Protocol):
    """Who watches operations on virtual GPUs, and decides that misplaced operands are noted instead of refused."""

    def mismatched(self, problem: DeviceMismatchError, tensors: Sequence[torch.Tensor]) -> None:
        """Operands lie where CUDA would refuse them; the operation runs nevertheless."""

    def ran(self, op: Any, args: Sequence[Any], outcome: Any) -> None:
        """An operation that computes has run."""

    def copied(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        """A tensor has been copied from one device to another."""


@dataclass(slots=True)
class Process:
    """What kernels ask for: the ledger of the current devices, and who watches them.

    `shape_only`: where tensors without bytes pretend to lie, None while every tensor has bytes. `decisions`: how often
    a value that nobody knows was decided by a rule. `caches`: by library, what lets go of tensors that it keeps on
    devices for as long as the process lives.
    """

    ledger: MemoryLedger = field(default_factory=lambda: MemoryLedger(()))
    observer: Observer | None = None
    shape_only: AddressRange | None = None
    decisions: Counter[Decision] = field(default_factory=Counter)
    caches: dict[str, Callable[[], None]] = field(default_factory=dict)

    def checked_index(self, device: torch.device) -> int:
        """The index that `device` names, 0 when it names none.

        Raises: RuntimeError in the words of CUDA when there is no such device.
        """
        index = device.index or 0
        if index >= self.ledger.num_devices:
            raise RuntimeError(
                f"vgpu error: invalid device ordinal: {device} does not exist, this process has "
                f"{self.ledger.num_devices} virtual GPUs"
            )
        return index


PROCESS = Process()
