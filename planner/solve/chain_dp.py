"""Exact `balance` placement of a chain of units on unequal devices, by dynamic programming.

A placement cuts the units, in execution order, into one contiguous stage per used device. For any bar (so many extra KV
positions, so much memory left free) each device may end its stage at certain ends from every start, and "can the rest
be covered by these devices?" is a small recursion over how many devices of each class are left. Growing a stage hardly
ever makes it smaller (only where a copy between two of its groups falls away); where it never does, those ends are one
run. The best bar is found by bisection over the values that stages can take, hence exactly. Devices with equal memory
and overheads form a class: eight equal GPUs cost as much as one with a counter to eight.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import TypeVar

from planner.errors import ConstraintError
from planner.machine import Device
from planner.memory import WORKSPACE_BYTES, StageLoad
from planner.problem import PlacedStage, Problem, Solution

Counts = tuple[int, ...]
Ends = list[list[int]]
"""Per class and start, the ends of a stage that starts there, as a bit set."""
Bar = Callable[[int, int, "DeviceClass"], bool]
Value = TypeVar("Value")

NO_KV = 2**62
"""Extra positions of a stage without KV cache: more than any machine holds."""


class DeviceClass:
    """Devices that are interchangeable: equal memory, equal overheads, and neither is named by a pin alone."""

    def __init__(self, positions: Sequence[int], device: Device, base_bytes: int) -> None:
        self.positions = tuple(positions)
        self.memory_bytes = device.memory_bytes
        overhead_bytes = device.context_bytes + device.reserve_bytes + WORKSPACE_BYTES
        self.capacity_bytes = device.memory_bytes - overhead_bytes - base_bytes


def solve(problem: Problem) -> Solution:
    """The placement of most extra KV positions; ties by largest smallest free fraction, then lower device index.

    As many devices are used as legally possible. When nothing fits, the solution is INFEASIBLE and holds the
    placement that lacks the fewest bytes on its worst device.
    Raises: ConstraintError when pins exclude every placement.
    """
    chain = _Chain(problem)
    options = chain.largest_feasible(chain.bar(extra=0))
    if not options:
        return chain.nearest_misfit()
    extra = _best(chain.extra_values(), lambda value: chain.coverable(options, chain.bar(extra=value)))
    free = _best(
        chain.free_fractions(extra), lambda value: chain.coverable(options, chain.bar(extra=extra, free=value))
    )
    stages = chain.stages(options, chain.bar(extra=extra, free=free))
    return Solution(status="OPTIMAL", stages=stages, extra_positions=extra, bound=extra, method="chain-dp")


class _Chain:
    """The loads of every contiguous run of units, and the questions asked about them."""

    def __init__(self, problem: Problem) -> None:
        self._units = problem.units
        self._classes = _device_classes(problem)
        self._bytes, self._kv = _segment_loads(problem)
        self._grows = [row[start + 1 :] == sorted(row[start + 1 :]) for start, row in enumerate(self._bytes)]

    def bar(self, *, extra: int, free: Fraction = Fraction(0), relief_bytes: int = 0) -> Bar:
        """Whether the units [start, end) on a device leave room for `extra` positions and the fraction `free`.

        `relief_bytes` pretends that every device had so much more memory.
        """

        def holds(start: int, end: int, kind: DeviceClass) -> bool:
            left = kind.capacity_bytes + relief_bytes - self._bytes[start][end]
            return left >= extra * self._kv[start][end] and left >= free * kind.memory_bytes

        return holds

    def largest_feasible(self, bar: Bar) -> list[Counts]:
        """The ways to use as many devices as can all be given something, or none when nothing fits."""
        by_size: dict[int, list[Counts]] = {}
        for counts in product(*(range(len(kind.positions) + 1) for kind in self._classes)):
            by_size.setdefault(sum(counts), []).append(counts)
        cover = self._cover(bar)
        for size in sorted(by_size, reverse=True):
            feasible = [counts for counts in by_size[size] if cover(counts) & 1]
            if feasible:
                return feasible
        return []

    def coverable(self, options: list[Counts], bar: Bar) -> bool:
        """Whether any of these device counts covers all units under `bar`."""
        cover = self._cover(bar)
        return any(cover(counts) & 1 for counts in options)

    def stages(self, options: list[Counts], bar: Bar) -> tuple[PlacedStage, ...]:
        """The placement that takes, stage by stage, the device of lowest index and then the longest run."""
        cover, ends = self._cover(bar), self._ends(bar)
        waiting = [list(kind.positions) for kind in self._classes]
        placed: list[PlacedStage] = []
        start = 0
        while start < len(self._units):
            kind, end, options = next(self._next_stages(start, options, waiting, ends, cover))
            members = sorted(member for unit in self._units[start:end] for member in unit.members)
            placed.append(PlacedStage(device=waiting[kind].pop(0), members=tuple(members)))
            start = end
        return tuple(placed)

    def nearest_misfit(self) -> Solution:
        """The placement whose worst device lacks the fewest bytes."""
        lacking = sorted(
            {
                max(0, self._bytes[start][end] - kind.capacity_bytes)
                for start, end in self._segments()
                for kind in self._classes
            }
        )
        found = bisect_left(lacking, True, key=lambda relief: bool(self._fits_with(relief)))
        if found == len(lacking):
            raise ConstraintError(
                "the pins leave no legal placement, whatever the memory: a device holds one contiguous run of modules "
                "in execution order. Pin fewer modules, or neighbours to one device."
            )
        relief = lacking[found]
        stages = self.stages(self._fits_with(relief), self.bar(extra=0, relief_bytes=relief))
        return Solution(status="INFEASIBLE", stages=stages, extra_positions=0, bound=0, method="chain-dp")

    def _fits_with(self, relief_bytes: int) -> list[Counts]:
        return self.largest_feasible(self.bar(extra=0, relief_bytes=relief_bytes))

    def extra_values(self) -> list[int]:
        """Every number of extra positions that some stage can hold, ascending."""
        values = {0}
        for start, end in self._segments():
            for kind in self._classes:
                left = kind.capacity_bytes - self._bytes[start][end]
                if left >= 0:
                    values.add(left // self._kv[start][end] if self._kv[start][end] else NO_KV)
        return sorted(values)

    def free_fractions(self, extra: int) -> list[Fraction]:
        """Every fraction of memory that some legal stage leaves free, ascending."""
        bar = self.bar(extra=extra)
        return sorted(
            {Fraction(0)}
            | {
                Fraction(kind.capacity_bytes - self._bytes[start][end], kind.memory_bytes)
                for start, end in self._segments()
                for kind in self._classes
                if bar(start, end, kind)
            }
        )

    def _segments(self) -> Iterator[tuple[int, int]]:
        for start in range(len(self._units)):
            for end in range(start + 1, len(self._units) + 1):
                yield start, end

    def _next_stages(
        self, start: int, options: list[Counts], waiting: list[list[int]], ends: Ends, cover: Callable[[Counts], int]
    ) -> Iterator[tuple[int, int, list[Counts]]]:
        """Classes and ends that a stage at `start` may take, best first, with the device counts left after it."""
        for kind in sorted((k for k, left in enumerate(waiting) if left), key=lambda k: waiting[k][0]):
            for end in (end for end in range(len(self._units), start, -1) if ends[kind][start] >> end & 1):
                left = [_less(counts, kind) for counts in options if counts[kind]]
                fitting = [counts for counts in left if cover(counts) >> end & 1]
                if fitting:
                    yield kind, end, fitting

    def _ends(self, bar: Bar) -> Ends:
        return [[self._ends_from(start, kind, bar) for start in range(len(self._units))] for kind in self._classes]

    def _ends_from(self, start: int, kind: DeviceClass, bar: Bar) -> int:
        others = (i for i in range(start, len(self._units)) if self._units[i].pinned not in (None, *kind.positions))
        ends = range(start + 1, next(others, len(self._units)) + 1)
        if self._grows[start]:
            fitting = bisect_right(ends, 0, key=lambda end: 0 if bar(start, end, kind) else 1)
            return (1 << (start + fitting + 1)) - (1 << (start + 1))
        return sum(1 << end for end in ends if bar(start, end, kind))

    def _cover(self, bar: Bar) -> Callable[[Counts], int]:
        """A function from device counts to a bit set: the starts from which exactly these devices cover the rest."""
        ends = self._ends(bar)
        num_units = len(self._units)
        known: dict[Counts, int] = {(0,) * len(self._classes): 1 << num_units}

        def starts(counts: Counts) -> int:
            if counts not in known:
                known[counts] = 0
                for kind in (kind for kind, count in enumerate(counts) if count):
                    known[counts] |= _starts_before(starts(_less(counts, kind)), ends[kind])
            return known[counts]

        return starts


def _starts_before(rest: int, ends: list[int]) -> int:
    """The starts from which one stage gets to a start in the bit set `rest`, as a bit set."""
    return sum(bool(rest & reachable) << start for start, reachable in enumerate(ends))


def _less(counts: Counts, kind: int) -> Counts:
    return (*counts[:kind], counts[kind] - 1, *counts[kind + 1 :])


def _device_classes(problem: Problem) -> list[DeviceClass]:
    """Interchangeable devices together; a device that a pin names stands alone."""
    pinned = {unit.pinned for unit in problem.units}
    alike: dict[object, list[int]] = {}
    for position, device in enumerate(problem.machine.devices):
        sizes = (device.memory_bytes, device.context_bytes, device.reserve_bytes, problem.base_bytes(position))
        alike.setdefault((position if position in pinned else None, sizes), []).append(position)
    return [
        DeviceClass(positions, problem.machine.devices[positions[0]], problem.base_bytes(positions[0]))
        for positions in alike.values()
    ]


def _segment_loads(problem: Problem) -> tuple[list[list[int]], list[list[int]]]:
    """Bytes without overheads, and KV bytes per position, of the units [start, end)."""
    count = len(problem.units)
    sizes = [[0] * (count + 1) for _ in range(count)]
    per_position = [[0] * (count + 1) for _ in range(count)]
    for start in range(count):
        stage = StageLoad(problem.table)
        for end in range(start + 1, count + 1):
            for member in problem.units[end - 1].members:
                stage.add(member)
            sizes[start][end] = stage.load_bytes
            per_position[start][end] = stage.kv_bytes_per_position
    return sizes, per_position


def _best(values: list[Value], holds: Callable[[Value], bool]) -> Value:
    """The largest of ascending `values` that holds, where what holds is a prefix and the first value does."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(values[middle]) else (low, middle)
    return values[low]
