"""Virtual GPUs: several devices of type `vgpu` on a machine without any, on which real models compute real values.

Computations run on the CPU; what is virtual is where a tensor lies. CUDA's rules on mixing devices are enforced,
and the bytes alive on each device are counted.
"""

from runtime.virtual.adapter import VirtualGpuUnavailableError
from runtime.virtual.devices import VirtualGpus, virtual_gpus
from runtime.virtual.ledger import MemoryLedger
from runtime.virtual.rules import DeviceMismatchError

__all__ = ["DeviceMismatchError", "MemoryLedger", "VirtualGpuUnavailableError", "VirtualGpus", "virtual_gpus"]
