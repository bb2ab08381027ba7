"""From what NVML says about the cards to a machine: plain data in, plain data out, no driver.

NVML orders by PCI bus and ignores CUDA_VISIBLE_DEVICES; CUDA does neither by default. So cards are told apart by UUID,
and numbered as CUDA numbers them in a process with the given environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from planner.errors import MachineError
from planner.machine import Machine, gpu_presets
from planner.timing import COPY_LATENCY_S, PCIE_BYTES_PER_S

ROUNDING_BYTES = 64 * 2**20
"""Free memory is rounded down to this: equal cards then count as equal, and a plan outlives small changes."""

NVLINK_BYTES_PER_S = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}
"""One link in one direction, by NVLink generation. Source: NVIDIA's NVLink pages and architecture white papers."""

PCIE_LANE_BYTES_PER_S = {3: 8e9 * 128 / 130 / 8, 4: 16e9 * 128 / 130 / 8, 5: 32e9 * 128 / 130 / 8}
"""One lane in one direction, by PCI Express generation. Source: its specifications, before protocol overhead."""

ADVICE = "Describe the machine instead: --gpus 2x24GiB, or --machine FILE."


@dataclass(frozen=True, slots=True, kw_only=True)
class MigReading:
    """One MIG instance: a slice of a card with memory of its own."""

    uuid: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """What NVML says about one card, in PCI order. With MIG on, only its instances can be used.

    `pcie_generation` is the best that card and slot can do together: idle cards link at a lower one.
    """

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int
    has_mig: bool = False
    mig_instances: tuple[MigReading, ...] = ()
    nvlink_generation: int | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReading:
    """What NVML says about copies from one card to another, by UUID.

    `can_copy` is whether the driver grants peer access, which is no proof that copies are right. `num_nvlinks` are
    active links from the source that lead to the target, directly or through a switch.
    """

    source: str
    target: str
    can_copy: bool
    num_nvlinks: int = 0


def machine_of(
    readings: Sequence[GpuReading], environment: Mapping[str, str], pairs: Sequence[PairReading] = ()
) -> Machine:
    """The machine that CUDA would see, given the cards and the process's environment.

    With cards of one model, CUDA's order is the bus order. With different ones it is fastest first unless
    CUDA_DEVICE_ORDER=PCI_BUS_ID, and nothing but CUDA knows that order. A process sees one MIG instance at most.
    Raises: MachineError when no card is visible, or their order cannot be known.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    instance = _visible_instance(readings, wanted)
    if instance is not None:
        return Machine.from_dict({"devices": [_entry(0, *instance)]})
    visible = list(readings) if wanted is None else _visible(readings, wanted)
    if not visible:
        cause = "none is installed" if not readings else f"CUDA_VISIBLE_DEVICES={wanted!r} hides all {len(readings)}"
        raise MachineError(f"no GPU to plan for: {cause}. {ADVICE}")
    _refuse_unknown_order(readings, visible, environment)
    names = {reading.uuid: f"cuda:{index}" for index, reading in enumerate(visible)}
    devices = [_entry(index, reading) for index, reading in enumerate(visible)]
    generations = {reading.uuid: reading.nvlink_generation for reading in visible}
    return Machine.from_dict({"devices": devices, "links": list(_links(pairs, names, generations))})


def available_bytes(meminfo: str) -> int | None:
    """What processes may still take of the host's memory, from Linux's /proc/meminfo; None where it does not say.

    Source: proc(5): MemAvailable, in kB of 1024 bytes. Rounded down, as the cards' free memory is.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 // ROUNDING_BYTES * ROUNDING_BYTES if found else None


def _visible_instance(readings: Sequence[GpuReading], wanted: str | None) -> tuple[GpuReading, MigReading] | None:
    """The MIG instance that a process sees: the one it names, or the first there is; None where cards are whole.

    Source: NVIDIA's MIG user guide: CUDA enumerates a single instance, the first when none is named.
    """
    instances = [(reading, instance) for reading in readings if reading.has_mig for instance in reading.mig_instances]
    if wanted is not None and wanted.startswith("MIG-"):
        first = wanted.split(",")[0].strip()
        named = next((found for found in instances if found[1].uuid.startswith(first)), None)
        if named is None:
            raise MachineError(f"CUDA_VISIBLE_DEVICES={wanted!r} names no MIG instance of this machine. {ADVICE}")
        return named
    visible = list(readings) if wanted is None else _visible(readings, wanted)
    sliced = [reading for reading in visible if reading.has_mig]
    if not sliced:
        return None
    if not sliced[0].mig_instances:
        raise MachineError(
            f"{sliced[0].name} ({sliced[0].uuid}) has MIG on and no instance: make one with nvidia-smi mig, or turn "
            f"MIG off. {ADVICE}"
        )
    return sliced[0], sliced[0].mig_instances[0]


def _refuse_unknown_order(
    readings: Sequence[GpuReading], visible: Sequence[GpuReading], environment: Mapping[str, str]
) -> None:
    ordered = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({r.name for r in readings}) < 2
    by_uuid = environment.get("CUDA_VISIBLE_DEVICES", "").startswith("GPU-")
    if not ordered and not by_uuid and len(visible) > 1:
        names = ", ".join(dict.fromkeys(reading.name for reading in readings))
        raise MachineError(
            f"the cards differ ({names}), and CUDA numbers them fastest first, which only CUDA knows. "
            "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, here and where the model runs."
        )


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
    digits = item[: len(item) - len(item.lstrip("0123456789"))]
    return readings[int(digits)] if digits and int(digits) < len(readings) else None


def _entry(index: int, reading: GpuReading, instance: MigReading | None = None) -> dict[str, object]:
    """The card, or a slice of it, as a machine file has it; a known whole card brings its speed along."""
    part = instance or reading
    entry: dict[str, object] = {
        "index": index,
        "uuid": part.uuid,
        "memory": f"{part.free_bytes // ROUNDING_BYTES * ROUNDING_BYTES}B",
    }
    if reading.pcie_lanes and reading.pcie_generation in PCIE_LANE_BYTES_PER_S:
        entry["host_bandwidth"] = f"{round(reading.pcie_lanes * PCIE_LANE_BYTES_PER_S[reading.pcie_generation])}B"
    kind = next((kind for kind, preset in gpu_presets().items() if reading.name in preset["nvml"]), None)
    return {**entry, "kind": kind} if kind and instance is None else entry


def _links(
    pairs: Sequence[PairReading], names: Mapping[str, str], generations: Mapping[str, int | None]
) -> Iterator[dict[str, object]]:
    """Links that are not what is assumed anyway: NVLink, and copies that have to go through the host's memory."""
    for pair in pairs:
        if pair.source not in names or pair.target not in names:
            continue
        ends = {"source": names[pair.source], "target": names[pair.target]}
        generation = generations[pair.source]
        if pair.num_nvlinks and generation in NVLINK_BYTES_PER_S:
            rate = pair.num_nvlinks * NVLINK_BYTES_PER_S[generation]
            yield {**ends, "bandwidth_bytes_per_s": rate, "latency_s": COPY_LATENCY_S}
        elif not pair.can_copy:
            yield {**ends, "bandwidth_bytes_per_s": PCIE_BYTES_PER_S / 2, "latency_s": 2 * COPY_LATENCY_S}
