"""Every contiguous run of units on every kind of device: whether it may lie there, what it leaves, what it takes.

Arrays are indexed [start, end] for the units [start, end); where that is no run, `fits` is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from planner.errors import ConstraintError
from planner.machine import Device
from planner.memory import WORKSPACE_BYTES, StageLoad
from planner.problem import NO_KV, TIMED, Problem
from planner.solve.crossings import NO_LINK, Crossings, link_groups
from planner.timing import NS_PER_S

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

BEYOND_BYTES = 2**59
"""More than any machine holds; larger loads count as this, so that differences stay within 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """Devices that are interchangeable: equal in all that the problem asks about, and no pin names one of several.

    `link_group` numbers devices between which links do not differ; `is_home` says that inputs and results are here.
    """

    positions: tuple[int, ...]
    device: Device
    capacity_bytes: int
    link_group: int
    is_home: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassSegments:
    """All runs on one class of device: extra KV positions, free share of memory, nanoseconds of arithmetic."""

    fits: Bools
    lacking_bytes: Ints
    extra_positions: Ints
    free_fraction: Floats
    compute_ns: Ints


class Segments:
    """What a solver of chains has to know about a problem, computed once for all objectives."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.num_units = len(problem.units)
        self.has_times = all(d.bandwidth_bytes_per_s and d.flops_per_s for d in problem.machine.devices)
        self.has_forbidden = any(not link.allowed for link in problem.machine.links)
        self.times = problem.times if self._links_matter else None
        self.groups_of_links = link_groups(problem.machine) if self._links_matter else [0] * len(_devices(problem))
        self.classes = self._device_classes()
        self.num_link_groups = max(self.groups_of_links) + 1
        self._bytes, self._kv = _loads(problem)
        self.by_class = [self._on(kind) for kind in self.classes]
        self.crossings = self.crossings_of(forbidden=False)

    def crossings_of(self, *, forbidden: bool) -> Crossings | None:
        """What crosses between runs, in nanoseconds or as uses of forbidden links; None where no link matters."""
        if self.times is None:
            return None
        return Crossings(self.problem, self.times, self.groups_of_links, forbidden=forbidden)

    @property
    def _links_matter(self) -> bool:
        return self.has_forbidden or (self.problem.objective in TIMED and self.has_times)

    def _device_classes(self) -> list[DeviceClass]:
        problem = self.problem
        timed = problem.objective in TIMED
        pinned = {unit.pinned for unit in problem.units}
        alike: dict[object, list[int]] = {}
        for position, device in enumerate(_devices(problem)):
            sizes = (device.memory_bytes, device.context_bytes, device.reserve_bytes, problem.base_bytes(position))
            speed = (device.bandwidth_bytes_per_s, device.flops_per_s, device.flops_fraction)
            key = (
                position if position in pinned or self._is_home(position) else None,
                sizes,
                speed if timed else None,
                self.groups_of_links[position],
            )
            alike.setdefault(key, []).append(position)
        return [self._device_class(positions) for positions in alike.values()]

    def _is_home(self, position: int) -> bool:
        """Whether crossings depend on this being the device where inputs and results are."""
        return self._links_matter and self.problem.graph.home is not None and position == 0

    def _device_class(self, positions: Sequence[int]) -> DeviceClass:
        first = positions[0]
        device = _devices(self.problem)[first]
        overhead_bytes = device.context_bytes + device.reserve_bytes + WORKSPACE_BYTES
        return DeviceClass(
            positions=tuple(positions),
            device=device,
            capacity_bytes=device.memory_bytes - overhead_bytes - self.problem.base_bytes(first),
            link_group=self.groups_of_links[first],
            is_home=self._is_home(first),
        )

    def _on(self, kind: DeviceClass) -> ClassSegments:
        left = kind.capacity_bytes - self._bytes
        legal = self._legal(kind)
        growing = np.maximum(self._kv, 1)
        return ClassSegments(
            fits=legal & (left >= 0),
            lacking_bytes=np.where(legal, np.maximum(-left, 0), NO_KV),
            extra_positions=np.where(self._kv > 0, left // growing, NO_KV),
            free_fraction=left / kind.device.memory_bytes,
            compute_ns=self._compute_ns(kind),
        )

    def _legal(self, kind: DeviceClass) -> Bools:
        """Runs of at least one unit, none of which is pinned elsewhere."""
        elsewhere = [unit.pinned not in (None, *kind.positions) for unit in self.problem.units]
        before = np.concatenate(([0], np.cumsum(elsewhere)))
        starts, ends = np.ogrid[: self.num_units, : self.num_units + 1]
        return np.asarray((ends > starts) & (before[ends] == before[starts]))

    def _compute_ns(self, kind: DeviceClass) -> Ints:
        times = self.times and self.times.groups[kind.positions[0]]
        if not self.times or not times:
            return np.zeros_like(self._bytes)
        spent = [[times[member].request_ns(self.times.new_tokens) for member in u.members] for u in self.problem.units]
        before = [0, *accumulate(map(sum, spent))]
        if before[-1] >= NO_LINK:
            raise ConstraintError(
                f"an answer of {self.times.new_tokens} tokens takes {before[-1] / NS_PER_S:.3g} s on "
                f"{kind.device.name} alone: times are compared up to {NO_LINK / NS_PER_S:.3g} s. "
                "Ask for fewer --new-tokens"
            )
        starts, ends = np.ogrid[: self.num_units, : self.num_units + 1]
        return np.asarray(np.array(before)[ends] - np.array(before)[starts])


def _devices(problem: Problem) -> tuple[Device, ...]:
    return problem.machine.devices


def _loads(problem: Problem) -> tuple[Ints, Ints]:
    """Bytes without overheads, and KV bytes per position, of the units [start, end)."""
    count = len(problem.units)
    sizes = np.zeros((count, count + 1), dtype=np.int64)
    per_position = np.zeros((count, count + 1), dtype=np.int64)
    for start in range(count):
        stage = StageLoad(problem.table)
        for end in range(start + 1, count + 1):
            for member in problem.units[end - 1].members:
                stage.add(member)
            sizes[start, end] = min(stage.load_bytes, BEYOND_BYTES)
            per_position[start, end] = min(stage.kv_bytes_per_position, BEYOND_BYTES)
    return sizes, per_position
