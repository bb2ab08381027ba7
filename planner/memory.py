"""Bytes that a set of groups takes on one device under one workload, always by the same eight parts.

Activations do not add up along a stage: they are a maximum over time. A device's activation peak is, over the phases,
the largest of its lasting flows plus the hungriest single group; its buffers are those of the phase with most of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from planner.graph import PHASES, Flow, ModuleGraph, ModuleGroup
from planner.machine import Device
from planner.polynomial import Polynomial, Quantities
from planner.units import MIB

WORKSPACE_BYTES = 32 * MIB + 20 * MIB
"""cuBLAS workspace and allocator rounding, per device.

Source: PyTorch takes 32 MiB for cuBLAS on Hopper and 8.1 MiB elsewhere (aten/src/ATen/cuda/CUDABlas.cpp), and its
allocator takes segments of 20 MiB for what is below 10 MiB (c10/cuda/CUDACachingAllocator.cpp, kLargeBuffer).
"""


LABELS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activations": "activations",
    "logits": "logits",
    "buffers": "buffers",
    "workspace": "workspace",
    "context": "context",
    "reserve": "reserve",
}
"""What each part is called in text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """Peak bytes of one device by part; `total_bytes` is their sum."""

    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    activations_bytes: int = 0
    logits_bytes: int = 0
    buffers_bytes: int = 0
    workspace_bytes: int = 0
    context_bytes: int = 0
    reserve_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All eight parts together."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def parts(self) -> dict[str, int]:
        """Part name without its unit, to bytes, in the fixed order."""
        return {part.name.removesuffix("_bytes"): getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLoad:
    """One group's polynomials evaluated for one workload; `transient_bytes` by phase, in the order of `PHASES`.

    `flows` and `ties` are places in the table's lists.
    """

    group: ModuleGroup
    weights_bytes: int
    kv_bytes_per_position: int
    buffers_bytes: int
    logits_bytes: int
    transient_bytes: tuple[int, ...]
    flows: tuple[int, ...]
    ties: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace's intervals under one workload, by group position, so that any set of groups can be replayed on a device.

    `held` gives, per group, (interval, bytes) pairs; `arrived`, per group, (interval, other group, bytes) of copies
    between the two that a shared device does not make.
    """

    num_intervals: int
    held: tuple[tuple[tuple[int, int], ...], ...]
    arrived: tuple[tuple[tuple[int, int, int], ...], ...]

    @classmethod
    def of(cls, graph: ModuleGraph, quantities: Quantities) -> Replay:
        """The replay of a graph's intervals; of none, nothing."""
        position = {group.id: i for i, group in enumerate(graph)}
        value = _Evaluated(quantities)
        held: list[list[tuple[int, int]]] = [[] for _ in position]
        arrived: list[list[tuple[int, int, int]]] = [[] for _ in position]
        for index, interval in enumerate(graph.intervals):
            for name, moments in interval.held:
                num_bytes = max(map(value, moments))
                if num_bytes > 0:
                    held[position[name]].append((index, num_bytes))
            for source, copied in interval.arrived:
                ends = position[source], position[interval.running or source]
                arrived[ends[0]].append((index, ends[1], value(copied)))
                arrived[ends[1]].append((index, ends[0], value(copied)))
        return cls(num_intervals=len(graph.intervals), held=tuple(map(tuple, held)), arrived=tuple(map(tuple, arrived)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Every group of a graph under one workload, evaluated once.

    `lasting` holds every lasting flow with its bytes, `tied_bytes` those of every tie. `kv_bytes_per_position` counts
    the whole batch.
    """

    loads: tuple[GroupLoad, ...]
    lasting: tuple[tuple[Flow, int], ...]
    positions: int
    replay: Replay
    tied_bytes: tuple[int, ...] = ()

    @classmethod
    def of(cls, graph: ModuleGraph, quantities: Quantities) -> CostTable:
        """The table of `graph` for the workload that `quantities` counts."""
        lasting = [flow for flow in graph.flows if flow.lasting]
        value = _Evaluated(quantities)
        return cls(
            loads=tuple(
                replace(
                    _load(group, lasting, quantities, value),
                    ties=tuple(i for i, tie in enumerate(graph.ties) if group.id in tie.groups),
                )
                for group in graph
            ),
            lasting=tuple((flow, flow.num_bytes(quantities)) for flow in lasting),
            positions=quantities.positions,
            replay=Replay.of(graph, quantities),
            tied_bytes=tuple(tie.num_bytes for tie in graph.ties),
        )

    def on_device(
        self, members: Iterable[int], device: Device, base_bytes: int = 0, *, running: bool = False
    ) -> MemoryBreakdown:
        """What `device` peaks at when it holds the groups at these positions; an unused device costs nothing.

        `base_bytes` are activations that it holds besides; with `running` the peak is that of a model that is loaded.
        """
        stage = StageLoad(self)
        for member in members:
            stage.add(member)
        return stage.breakdown(device, base_bytes, running=running)


class StageLoad:
    """A running sum over the groups of one stage, so that growing a stage by one group costs one addition."""

    def __init__(self, table: CostTable) -> None:
        self._table = table
        self._flows: set[int] = set()
        self._ties: set[int] = set()
        self._lasting = [0] * len(PHASES)
        self._shared_buffers = [0] * len(PHASES)
        self._transient = [0] * len(PHASES)
        self._members: set[int] = set()
        self._replayed = [0] * table.replay.num_intervals
        self.weights_bytes = 0
        self.kv_bytes_per_position = 0
        self._own_buffers_bytes = 0
        self.logits_bytes = 0
        self._loading_bytes = 0

    def add(self, member: int) -> None:
        """Take in the group at this position of the table."""
        load = self._table.loads[member]
        self._members.add(member)
        self._replay(member)
        self.weights_bytes += load.weights_bytes - sum(self._table.tied_bytes[i] for i in load.ties if i in self._ties)
        self._ties.update(load.ties)
        self.kv_bytes_per_position += load.kv_bytes_per_position
        self._own_buffers_bytes += load.buffers_bytes
        self.logits_bytes += load.logits_bytes
        self._loading_bytes = max(self._loading_bytes, load.group.loading_bytes)
        self._transient = [max(pair) for pair in zip(self._transient, load.transient_bytes, strict=True)]
        for index in load.flows:
            if index not in self._flows:
                self._flows.add(index)
                flow, num_bytes = self._table.lasting[index]
                alive = self._shared_buffers if flow.is_buffer else self._lasting
                alive[PHASES.index(flow.phase)] += num_bytes

    def _replay(self, member: int) -> None:
        for interval, num_bytes in self._table.replay.held[member]:
            self._replayed[interval] += num_bytes
        for interval, other, num_bytes in self._table.replay.arrived[member]:
            if other in self._members and other != member:
                self._replayed[interval] -= num_bytes

    @property
    def buffers_bytes(self) -> int:
        """The groups' own buffers and, of the phase with most, those they share."""
        return self._own_buffers_bytes + max(self._shared_buffers)

    @property
    def activations_bytes(self) -> int:
        """The largest, over the phases, of what lasts plus what is transient."""
        by_phase = (lasting + transient for lasting, transient in zip(self._lasting, self._transient, strict=True))
        return max(0, *by_phase, *self._replayed)

    @property
    def _beside_bytes(self) -> int:
        """What there is beside weights and activations when the model runs, and not before."""
        return self.kv_bytes_per_position * self._table.positions + self.logits_bytes + self.buffers_bytes

    @property
    def running_bytes(self) -> int:
        """Everything but the device's own overheads, when the model runs."""
        return self.weights_bytes + self.activations_bytes + self._beside_bytes

    @property
    def loading_bytes(self) -> int:
        """The same when it is loaded: all weights, and what the last of them takes for a moment."""
        return self.weights_bytes + self._loading_bytes

    def breakdown(self, device: Device, base_bytes: int = 0, *, running: bool = False) -> MemoryBreakdown:
        """The stage's eight parts on `device`, which holds `base_bytes` of activations besides.

        Where loading takes more than running, that is counted with the activations, unless `running` is asked for.
        """
        if not self._members:
            return MemoryBreakdown()
        loading_bytes = 0 if running else self._loading_bytes - self._beside_bytes
        return MemoryBreakdown(
            weights_bytes=self.weights_bytes,
            kv_cache_bytes=self.kv_bytes_per_position * self._table.positions,
            activations_bytes=max(self.activations_bytes, loading_bytes) + base_bytes,
            logits_bytes=self.logits_bytes,
            buffers_bytes=self.buffers_bytes,
            workspace_bytes=WORKSPACE_BYTES,
            context_bytes=device.context_bytes,
            reserve_bytes=device.reserve_bytes,
        )


class _Evaluated:
    """Polynomials under one workload, each evaluated once: the layers of a model share theirs."""

    def __init__(self, quantities: Quantities) -> None:
        self._quantities = quantities
        self._values: dict[int, int] = {}

    def __call__(self, polynomial: Polynomial) -> int:
        key = id(polynomial)
        if key not in self._values:
            self._values[key] = polynomial(self._quantities)
        return self._values[key]


def _load(group: ModuleGroup, lasting: list[Flow], quantities: Quantities, value: _Evaluated) -> GroupLoad:
    moments = [cost.moments_bytes if (cost := group.cost(phase)) else () for phase in PHASES]
    return GroupLoad(
        group=group,
        weights_bytes=group.weight_bytes,
        kv_bytes_per_position=group.kv_bytes_per_position * quantities.batch,
        buffers_bytes=value(group.buffer_bytes),
        logits_bytes=value(group.logits_bytes),
        transient_bytes=tuple(max(map(value, of_phase), default=0) for of_phase in moments),
        flows=tuple(i for i, flow in enumerate(lasting) if group.id in (flow.producer, *flow.consumers)),
    )
