"""What a map costs, from its run: peak per device by part, traffic, idle time, and how long a cache still fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from planner.diagnosis.coverage import ModelNames
from planner.diagnosis.diagnosis import OFFLOADED, Block, Crossing, DeviceLoad, Finding, MapCosts, Place
from planner.graph import Phase
from planner.machine import Device, Machine
from planner.memory import LABELS, WORKSPACE_BYTES, MemoryBreakdown
from planner.paths import collapse, contains, owner
from planner.units import KIB, format_bytes
from runtime.diagnosis.held import HeldWeights
from runtime.diagnosis.map_run import MapRun, Usage

MUCH = 1.25
"""How many times as good a plan must be for a map to be called wasteful beside it."""

MUCH_PER_TOKEN_BYTES = 256 * KIB
"""Below it a copy is bound by its latency: 256 KiB are 8 microseconds at the 32 GB/s of PCIe 4.0 x16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostedRun:
    """A run of a map and what of the model lay where."""

    run: MapRun
    atoms: tuple[str, ...]
    names: ModelNames
    placement: Mapping[str, Place]
    home: int
    held: HeldWeights = field(default_factory=HeldWeights)

    def saved_bytes(self, index: int) -> int:
        """What weights in fewer bits save on a GPU, compared with the run's."""
        return sum(
            plain - self.held.num_bytes[name]
            for name, plain in self.held.plain_bytes.items()
            if self.place(name) == index
        )

    def scratch_bytes(self, index: int) -> int:
        """What the largest product by weights in fewer bits needs for a moment on a GPU."""
        needs = self.held.scratch_bytes.items()
        return max((num_bytes for name, num_bytes in needs if self.place(name) == index), default=0)

    def offloaded_bytes(self, names: Sequence[str]) -> int:
        """Bytes of those tensors that are kept on the host or disk."""
        return sum(self.names.parameters.get(name, 0) for name in names if self.place(name) in OFFLOADED)

    def place(self, name: str) -> Place:
        """Where a tensor is kept."""
        entry = owner(name, self.placement)
        return self.placement[entry] if entry is not None else "cpu"


def costs_of(title: str, costed: CostedRun, machine: Machine, positions: int, failed: Sequence[str] = ()) -> MapCosts:
    """The costs of a run's map on `machine`, with a KV cache of `positions`; blocks of `failed` modules are marked."""
    peaks = [_peak(costed, device, positions) for device in machine.devices]
    prefill, decode = (_idle(costed.run, machine, phase) for phase in ("prefill", "decode"))
    loads = [
        DeviceLoad(
            device=device.name,
            memory_bytes=device.memory_bytes,
            peak=peak,
            idle_prefill=prefill.get(device.index),
            idle_decode=decode.get(device.index),
        )
        for device, peak in zip(machine.devices, peaks, strict=True)
    ]
    return MapCosts(
        title=title,
        loads=tuple(loads),
        blocks=tuple(_blocks(costed, failed)),
        crossings=tuple(_crossings(costed.run, machine)),
        kv_positions=_kv_positions(costed.run, machine, peaks, positions),
    )


def cost_findings(given: MapCosts | None, ours: MapCosts | None) -> Iterator[Finding]:
    """What does not fit, and what a plan of ours does much better."""
    if given is None:
        return
    yield from _too_full(given)
    if ours is None:
        return
    empty = [
        g.device for g, o in zip(given.loads, ours.loads, strict=True) if not g.peak.total_bytes < o.peak.total_bytes
    ]
    unused = [g.device for g in given.loads if not g.peak.weights_bytes and g.device not in empty]
    if unused:
        yield Finding(
            severity="wasteful",
            hazard="oom",
            title=f"{', '.join(unused)} hold{'s'[: len(unused) == 1]} nothing",
            evidence=(f"a plan of ours uses all of {', '.join(load.device for load in ours.loads)}",),
            fix="Spread the layers over all GPUs, or give the map fewer.",
        )
    if given.kv_positions is not None and ours.kv_positions and ours.kv_positions > MUCH * given.kv_positions:
        yield Finding(
            severity="wasteful",
            hazard="oom",
            title=f"room for {max(0, given.kv_positions):,} KV positions per sequence; {ours.kv_positions:,} would fit",
            evidence=("the fullest GPU ends the cache while others have memory left",),
            fix="Take our plan, or move layers from the fullest GPU to the emptiest.",
        )
    mine, best = given.crossing_bytes("decode"), ours.crossing_bytes("decode")
    if mine > MUCH * best and mine - best > MUCH_PER_TOKEN_BYTES:
        yield Finding(
            severity="wasteful",
            hazard="p2p",
            title=f"{format_bytes(mine)} are copied between GPUs for every token, where {format_bytes(best)} would do",
            evidence=tuple(
                f"{c.source} -> {c.target}: {format_bytes(c.num_bytes)} in {c.num_copies:g} copies per token"
                for c in given.crossings
                if c.phase == "decode"
            ),
            fix="Let each GPU hold one run of layers.",
        )


def _too_full(costs: MapCosts) -> Iterator[Finding]:
    for load in costs.loads:
        if load.memory_bytes is None or load.peak.total_bytes <= load.memory_bytes:
            continue
        short = load.peak.total_bytes - load.memory_bytes
        largest = max(load.peak.parts, key=lambda part: load.peak.parts[part])
        yield Finding(
            severity="will fail" if short > load.peak.reserve_bytes else "may fail",
            hazard="oom",
            title=f"{load.device} needs {format_bytes(load.peak.total_bytes)} of {format_bytes(load.memory_bytes)}",
            evidence=(
                " + ".join(f"{format_bytes(n)} {LABELS[part]}" for part, n in load.peak.parts.items() if n),
                f"most of it is {LABELS[largest]}",
            ),
            fix=f"Move {format_bytes(short)} elsewhere, or ask for fewer tokens, images or sequences.",
            place=load.device,
        )


def _peak(costed: CostedRun, device: Device, positions: int) -> MemoryBreakdown:
    """Eight parts of one device: weights as placed, activations as seen, the cache at its full length."""
    usage = costed.run.usage.get(device.index)
    if usage is None or not any(usage.peak_bytes.values()):
        return MemoryBreakdown()
    away = costed.offloaded_bytes(list(costed.names.parameters)) if device.index == costed.home else 0
    brought = max((costed.offloaded_bytes([name]) for name in costed.names.parameters), default=0) if away else 0
    held = (
        usage.peak_bytes[phase] - usage.weight_bytes - usage.cache_bytes.get(phase, 0) for phase in usage.peak_bytes
    )
    return MemoryBreakdown(
        weights_bytes=max(0, usage.weight_bytes - away - costed.saved_bytes(device.index)),
        kv_cache_bytes=usage.growth_bytes * positions + usage.fixed_cache_bytes,
        activations_bytes=max(0, *held) + brought + costed.scratch_bytes(device.index),
        workspace_bytes=WORKSPACE_BYTES,
        context_bytes=device.context_bytes,
        reserve_bytes=device.reserve_bytes,
    )


def _kv_positions(run: MapRun, machine: Machine, peaks: Sequence[MemoryBreakdown], positions: int) -> int | None:
    """The longest cache per sequence that fits on every device that holds some of it."""
    room = [
        positions + (device.memory_bytes - peak.total_bytes) // usage.growth_bytes
        for device, peak in zip(machine.devices, peaks, strict=True)
        if (usage := run.usage.get(device.index)) is not None and usage.growth_bytes
    ]
    return min(room) if room else None


def _idle(run: MapRun, machine: Machine, phase: Phase) -> dict[int, float]:
    """The share of one request's time in which each device waits; empty where nothing was counted."""
    known = all(device.flops_per_s and device.bandwidth_bytes_per_s for device in machine.devices)
    times_s = {device.index: _busy_s(run.usage.get(device.index), device, phase, known) for device in machine.devices}
    total_s = sum(times_s.values())
    return {index: 1 - time_s / total_s for index, time_s in times_s.items()} if total_s else {}


def _busy_s(usage: Usage | None, device: Device, phase: Phase, known: bool) -> float:
    """Seconds at the device's rates; of devices with unknown rates, in units that are the same for all."""
    if usage is None:
        return 0.0
    if phase == "decode":
        return usage.read_bytes.get(phase, 0) / (
            device.bandwidth_bytes_per_s if known and device.bandwidth_bytes_per_s else 1
        )
    return usage.flops.get(phase, 0) / (device.flops_per_s if known and device.flops_per_s else 1)


def _crossings(run: MapRun, machine: Machine) -> Iterator[Crossing]:
    """Copies of one prompt, and of one token, between GPUs of the machine."""
    num_tokens = max(1, run.num_steps - 1)
    gpus = {f"vgpu:{device.index}": device.name for device in machine.devices}
    for transfer in run.transfers:
        if not {transfer.source, transfer.target} <= gpus.keys() or transfer.source == transfer.target:
            continue
        passes = num_tokens if transfer.phase == "decode" else 1
        yield Crossing(
            source=gpus[transfer.source],
            target=gpus[transfer.target],
            phase=transfer.phase,
            num_bytes=transfer.num_bytes // passes,
            num_copies=transfer.count / passes,
        )


def _blocks(costed: CostedRun, failed: Sequence[str]) -> Iterator[Block]:
    """The model in its own order, in the fewest pieces that lie on one device each; list elements stay single."""
    places: dict[str, tuple[Place, bool]] = {}
    for atom in costed.atoms:
        tensors = [name for name in costed.names.tensors if contains(atom, name)]
        is_whole = len({costed.place(name) for name in tensors}) < 2
        for part in [atom] if is_whole else tensors:
            is_failed = any(contains(part, name) or contains(name, part) for name in failed)
            places[part] = (costed.place(tensors[0] if is_whole and tensors else part), is_failed)
    for module, (place, is_failed) in collapse(places).items():
        yield Block(
            module=module or "the model",
            device=f"cuda:{place}" if isinstance(place, int) else place,
            num_bytes=costed.names.bytes_under(module),
            failed=is_failed,
        )
