"""The set of virtual GPUs that this process has now: one for all threads, as with real devices.

It only remembers; `devices.py` decides when the set may change.
"""

from dataclasses import dataclass, field

import torch

from runtime.virtual.ledger import MemoryLedger


@dataclass(slots=True)
class Process:
    """What kernels ask for: the ledger of the current devices."""

    ledger: MemoryLedger = field(default_factory=lambda: MemoryLedger(()))

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
