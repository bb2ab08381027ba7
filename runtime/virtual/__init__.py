"""Virtual GPUs: several devices of type `vgpu` on a machine without any, on which real models compute real values.

Computations run on the CPU; what is virtual is where a tensor lies. CUDA's rules on mixing devices are enforced,
and the bytes alive on each device are counted. In shape-only mode floating-point tensors have no bytes and nothing is
computed, so that models of any size run.
"""

from runtime.virtual.adapter import VirtualGpuUnavailableError
from runtime.virtual.devices import VirtualGpus, virtual_gpus
from runtime.virtual.ledger import MemoryLedger
from runtime.virtual.rules import DeviceMismatchError
from runtime.virtual.unknowns import Decision, ShapeOnlyError

__all__ = [
    "Decision",
    "DeviceMismatchError",
    "MemoryLedger",
    "ShapeOnlyError",
    "VirtualGpuUnavailableError",
    "VirtualGpus",
    "virtual_gpus",
]
