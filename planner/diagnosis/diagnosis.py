"""What is wrong with a device map, as a value: findings with evidence and fix, the repair, and what the map costs.

Whoever runs models fills it in; whoever reports reads it. Nothing here runs or prints.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from planner.graph import Phase
from planner.machine import Machine
from planner.memory import MemoryBreakdown
from planner.textfile import dump_mapping

Severity = Literal["will fail", "may fail", "wasteful"]
SEVERITIES: tuple[Severity, ...] = ("will fail", "may fail", "wasteful")

Hazard = Literal[
    "merge",
    "nosplit",
    "bareparam",
    "tied",
    "rope",
    "kvcache",
    "crosslayer",
    "genio",
    "hardcuda",
    "launcher",
    "p2p",
    "offload",
    "oom",
    "model",
]

HAZARDS: dict[Hazard, str] = {
    "merge": "two paths, such as image and text, meet on different devices",
    "nosplit": "a cut inside a block whose parts meet again",
    "bareparam": "a tensor that no module of its own holds, or an entry that matches nothing",
    "tied": "one weight under two names on two devices",
    "rope": "position tables that no checkpoint contains",
    "kvcache": "a cache on another device than its layer",
    "crosslayer": "a tensor made once and read by many layers",
    "genio": "inputs, masks or logits on another device than what they meet",
    "hardcuda": "code that names a device, or makes a tensor without one",
    "launcher": "a launcher's processes with a map that spans GPUs",
    "p2p": "copies between GPUs without direct access",
    "offload": "weights on the host or disk between uses",
    "oom": "memory and balance",
    "model": "the model itself, or what planned the map, stopped",
}
"""The classes of what breaks, one line each."""

OFFLOADED = ("cpu", "disk")
Place = int | str
"""A GPU's index, `cpu` or `disk`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing to know about a map: how bad, of which class, where, what shows it, and what to do.

    `place` is a line of code or an entry of the map, empty where there is none; `modules` are those involved.
    """

    severity: Severity
    hazard: Hazard
    title: str
    fix: str
    evidence: tuple[str, ...] = ()
    place: str = ""
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """An entry that the repair changes: `source` None is one that was not there, `target` None one that goes."""

    module: str
    source: Place | None
    target: Place | None
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """The changed map, what changed, and whether a run of it was clean; `reasons` say why entries moved."""

    device_map: Mapping[str, Place]
    moves: tuple[Move, ...]
    proven: bool
    reasons: tuple[str, ...] = ()

    @property
    def moved_bytes(self) -> int:
        """Bytes of weights that lie elsewhere afterwards."""
        return sum(move.num_bytes for move in self.moves)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A run of modules on one device, with the bytes of its weights; `failed` when a failure involves it."""

    module: str
    device: str
    num_bytes: int
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Copies from one device to another in one phase, per prompt or per token: bytes, and how many copies."""

    source: str
    target: str
    phase: Phase
    num_bytes: int
    num_copies: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLoad:
    """One device under a map: what it peaks at by part, of how much, and the share of time that it waits.

    Idle shares are of one request: prefill by FLOPs, decode by bytes read, each over the device's own rate where the
    machine says one. None where nothing was counted.
    """

    device: str
    memory_bytes: int | None
    peak: MemoryBreakdown
    idle_prefill: float | None = None
    idle_decode: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MapCosts:
    """What a map costs: peak per device, traffic, and the KV positions per sequence that fit, None without a cache."""

    title: str
    loads: tuple[DeviceLoad, ...]
    blocks: tuple[Block, ...]
    crossings: tuple[Crossing, ...]
    kv_positions: int | None = None

    def crossing_bytes(self, phase: Phase) -> int:
        """Bytes copied between devices in one pass of a phase."""
        return sum(crossing.num_bytes for crossing in self.crossings if crossing.phase == phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything found out about one device map for one model.

    `runs` say what was executed; `given` and `ours` are what the map and a plan of ours cost, None without a machine.
    """

    model: str
    origin: str
    device_map: Mapping[str, Place]
    findings: tuple[Finding, ...]
    runs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    repair: Repair | None = None
    machine: Machine | None = None
    given: MapCosts | None = None
    ours: MapCosts | None = None

    @property
    def safe(self) -> bool:
        """Whether nothing was found that will fail."""
        return not self.of("will fail")

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    @property
    def verdict(self) -> str:
        """One line: how many findings of each severity."""
        counts = [f"{len(self.of(severity))} {severity}" for severity in SEVERITIES if self.of(severity)]
        return ", ".join(counts) if counts else "clean"

    @property
    def diff(self) -> str:
        """The repair as a unified diff of the map; empty where there is none."""
        return map_diff(self.device_map, self.repair.device_map) if self.repair else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "map": self.origin,
            "safe": self.safe,
            "verdict": self.verdict,
            "runs": list(self.runs),
            "notes": list(self.notes),
            "findings": [asdict(finding) for finding in self.findings],
            "device_map": dict(self.device_map),
            "repair": _repair_to(self.repair, self.diff) if self.repair else None,
            "machine": self.machine.to_dict() if self.machine else None,
            "costs": {name: _costs_to(costs) for name, costs in (("given", self.given), ("ours", self.ours)) if costs},
        }


def sorted_findings(findings: list[Finding]) -> tuple[Finding, ...]:
    """Worst first, otherwise in the order found."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def map_diff(before: Mapping[str, Place], after: Mapping[str, Place]) -> str:
    """A unified diff of two maps as YAML, with one line of context."""
    old, new = (dump_mapping(dict(entries)).splitlines() if entries else [] for entries in (before, after))
    return "\n".join(difflib.unified_diff(old, new, fromfile="device_map", tofile="repaired", lineterm="", n=1))


def _repair_to(repair: Repair, diff: str) -> dict[str, Any]:
    return {**asdict(repair), "device_map": dict(repair.device_map), "moved_bytes": repair.moved_bytes, "diff": diff}


def _costs_to(costs: MapCosts) -> dict[str, Any]:
    loads = [{**asdict(load), "peak_bytes": load.peak.total_bytes} for load in costs.loads]
    return {**asdict(costs), "loads": loads}
