"""The GPUs of this machine, by NVML: free memory without creating a CUDA context, which costs hundreds of MiB a card.

Reading (`read_gpus`) and interpreting (`machine_of`) are apart, so that the rules can be tested on written-down
readings. NVML orders by PCI bus and ignores CUDA_VISIBLE_DEVICES; CUDA does neither by default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pynvml

from planner.errors import MachineError
from planner.machine import Machine, gpu_presets

ROUNDING_BYTES = 64 * 2**20
"""Free memory is rounded down to this: equal cards then count as equal, and a plan outlives small changes."""

ADVICE = "Describe the machine instead: --gpus 2x24GiB, or --machine FILE."


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """What NVML says about one card, in PCI order."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


def probe_machine() -> Machine:
    """The visible GPUs and their free memory, numbered as CUDA numbers them.

    Raises: MachineError when there is no driver, no GPU, or none is visible.
    """
    return machine_of(read_gpus(), os.environ)


def read_gpus() -> list[GpuReading]:
    """Every card that NVML lists.

    Raises: MachineError naming the NVML error, or the card that failed.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        raise MachineError(f"no NVIDIA driver answers here (NVML: {problem}). {ADVICE}") from problem
    try:
        return [_read_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def machine_of(readings: Sequence[GpuReading], environment: Mapping[str, str]) -> Machine:
    """The machine that CUDA would see, given the cards and the process's environment.

    With cards of one model, CUDA's order is the bus order. With different ones it is fastest first unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID, and nothing but CUDA knows that order.
    Raises: MachineError when no card is visible, or their order cannot be known.
    """
    ordered = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({r.name for r in readings}) < 2
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    visible = list(readings) if wanted is None else _visible(readings, wanted)
    if not visible:
        cause = "none is installed" if not readings else f"CUDA_VISIBLE_DEVICES={wanted!r} hides all {len(readings)}"
        raise MachineError(f"no GPU to plan for: {cause}. {ADVICE}")
    by_uuid = wanted is not None and wanted.startswith("GPU-")
    if not ordered and not by_uuid and len(visible) > 1:
        names = ", ".join(dict.fromkeys(reading.name for reading in readings))
        raise MachineError(
            f"the cards differ ({names}), and CUDA numbers them fastest first, which only CUDA knows. "
            "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, here and where the model runs."
        )
    return Machine.from_dict({"devices": [_entry(index, reading) for index, reading in enumerate(visible)]})


def _visible(readings: Sequence[GpuReading], wanted: str) -> list[GpuReading]:
    """CUDA's own rules: ordinals or UUID prefixes; the first bad entry ends the list, a repeated one empties it."""
    chosen: list[GpuReading] = []
    for item in wanted.split(","):
        match = _match(readings, item.strip())
        if match is None:
            break
        if match in chosen:
            return []
        chosen.append(match)
    return chosen


def _match(readings: Sequence[GpuReading], item: str) -> GpuReading | None:
    if item.startswith("GPU-"):
        return next((reading for reading in readings if reading.uuid.startswith(item)), None)
    digits = "".join(character for character in item if character.isdigit()) if item[:1].isdigit() else ""
    return readings[int(digits)] if digits and int(digits) < len(readings) else None


def _read_gpu(index: int) -> GpuReading:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuReading(
            name=_text(pynvml.nvmlDeviceGetName(handle)),
            uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
            total_bytes=int(memory.total),
            free_bytes=int(memory.free),
        )
    except pynvml.NVMLError as problem:
        raise MachineError(f"GPU {index} does not answer (NVML: {problem}). {ADVICE}") from problem


def _text(value: str | bytes) -> str:
    """NVML's bindings gave bytes before version 11.5."""
    return value.decode() if isinstance(value, bytes) else value


def _entry(index: int, reading: GpuReading) -> dict[str, object]:
    """The card as a machine file has it; a known model brings its speed along."""
    entry = {
        "index": index,
        "uuid": reading.uuid,
        "memory": f"{reading.free_bytes // ROUNDING_BYTES * ROUNDING_BYTES}B",
    }
    kind = next((kind for kind, preset in gpu_presets().items() if reading.name in preset["nvml"]), None)
    return {**entry, "kind": kind} if kind else entry
