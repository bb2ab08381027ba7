"""Bytes of every contiguous run of units at once, as arrays.

The same sums as `planner.memory.StageLoad` makes for one stage, for all runs [start, end) of a chain; some groups may
be carried by every run besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.constraints import Unit
from planner.graph import PHASES
from planner.memory import CostTable, GroupLoad

Ints = NDArray[np.int64]
Numbers = NDArray[Any]
"""Whole numbers: of 64 bits, or Python's own where those would not hold them."""

BEYOND_BYTES = 2**59
"""More than any machine holds; larger loads count as this, so that differences stay within 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLoads:
    """Of the units [start, end): bytes without overheads when they run and when they are loaded, and KV bytes per
    position.
    """

    running_bytes: Ints
    loading_bytes: Ints
    kv_bytes_per_position: Ints


def run_loads(table: CostTable, chain: Sequence[Unit], carried: tuple[int, ...]) -> RunLoads:
    """What every run of the chain takes with the groups carried besides. Shape: (units, units + 1)."""
    rows = _Rows(table, [unit.members for unit in chain], carried)
    weights = rows.totals(lambda load: load.weights_bytes) - rows.tied_again()
    cache = rows.totals(lambda load: load.kv_bytes_per_position)
    lasting, shared = rows.lasting(is_buffer=False), rows.lasting(is_buffer=True)
    transient = rows.maxima(lambda load: load.transient_bytes, len(PHASES))
    activations = np.maximum((lasting + transient).max(axis=2), rows.replayed())
    beside = rows.totals(lambda load: load.logits_bytes + load.buffers_bytes) + shared.max(axis=2)
    loading = rows.maxima(lambda load: (load.group.loading_bytes,), 1)[..., 0]
    return RunLoads(
        running_bytes=_clipped(weights + cache * table.positions + activations + beside),
        loading_bytes=_clipped(weights + loading),
        kv_bytes_per_position=_clipped(cache),
    )


class _Rows:
    """Figures of groups summed over runs; a member's place is its unit's, or before the first where it is carried."""

    def __init__(self, table: CostTable, members: Sequence[tuple[int, ...]], carried: tuple[int, ...]) -> None:
        self._table = table
        self._count = len(members)
        self._place = {member: place for place, unit in enumerate(members, 1) for member in unit}
        self._place |= dict.fromkeys(carried, 0)
        self._dtype: type = np.int64 if _most(table) < 2**62 else object

    def totals(self, of: Callable[[GroupLoad], int]) -> Numbers:
        """Sums of a figure of each group. Shape: (starts, ends)."""
        by_place = self._zeros(self._count + 1)
        for member, place in self._place.items():
            by_place[place] += of(self._table.loads[member])
        return self._between(by_place)

    def tied_again(self) -> Numbers:
        """Bytes of tied weights that a run counts more than once."""
        found = self._zeros(self._count, self._count + 1)
        for tie, num_bytes in enumerate(self._table.tied_bytes):
            users = self.totals(partial(_uses, tie))
            found += num_bytes * np.maximum(users - 1, 0)
        return found

    def maxima(self, of: Callable[[GroupLoad], Sequence[int]], width: int) -> Numbers:
        """The largest of each of so many figures of the groups. Shape: (starts, ends, width)."""
        by_place = self._zeros(self._count + 1, width)
        for member, place in self._place.items():
            by_place[place] = np.maximum(by_place[place], of(self._table.loads[member]))
        found = self._zeros(self._count, self._count + 1, width)
        for start in range(self._count):
            rows = np.concatenate([by_place[:1], by_place[start + 1 :]])
            found[start, start:] = np.maximum.accumulate(rows, axis=0)
        return found

    def lasting(self, *, is_buffer: bool) -> Numbers:
        """Flows that last, each once, however many of its ends are in a run. Shape: (starts, ends, phases)."""
        found = self._zeros(self._count, self._count + 1, len(PHASES))
        starts = np.arange(self._count)
        ends: dict[int, list[int]] = {}
        for member, place in self._place.items():
            for index in self._table.loads[member].flows:
                ends.setdefault(index, []).append(place)
        for index, places in ends.items():
            flow, num_bytes = self._table.lasting[index]
            if flow.is_buffer == is_buffer:
                ordered = np.array(sorted(places))
                first = np.searchsorted(ordered, starts, side="right")
                entered = np.append(ordered, self._count + 1)[first]
                entered = starts if ordered[0] == 0 else entered
                inside = entered <= self._count
                found[starts[inside], entered[inside], PHASES.index(flow.phase)] += num_bytes
        return np.asarray(found.cumsum(axis=1))

    def replayed(self) -> Numbers:
        """The largest, over the intervals, of what groups held, less copies between those of a run; zero or more."""
        replay = self._table.replay
        held = self._zeros(self._count + 1, replay.num_intervals)
        for member, place in self._place.items():
            for interval, num_bytes in replay.held[member]:
                held[place, interval] += num_bytes
        copies = sorted(self._copies(), reverse=True)
        found = self._zeros(self._count, self._count + 1)
        for start in reversed(range(self._count)):
            while copies and copies[0][0] > start:
                _, later, interval, num_bytes = copies.pop(0)
                held[later, interval] -= num_bytes
            found[start, start:] = self._largest(held, copies, start)
        return found

    def _largest(self, held: Numbers, copies: list[tuple[int, int, int, int]], start: int) -> Numbers:
        rows = np.concatenate([held[:1], held[start + 1 :]])
        for earlier, later, interval, num_bytes in copies:
            if earlier == 0 and (later == 0 or later > start):
                rows[later - start if later else 0, interval] -= num_bytes
        return np.asarray(rows.cumsum(axis=0).max(axis=1, initial=0))

    def _copies(self) -> Iterator[tuple[int, int, int, int]]:
        """Copies between two groups: the place of the earlier and of the later, the interval, and bytes."""
        for member, place in self._place.items():
            for interval, other, num_bytes in self._table.replay.arrived[member]:
                if other < member and other in self._place:
                    yield *sorted((place, self._place[other])), interval, num_bytes  # type: ignore[misc]  # two ints

    def _between(self, by_place: Numbers) -> Numbers:
        before = np.concatenate([self._zeros(1), by_place[1:].cumsum()])
        return np.asarray(np.maximum(before[None, :] - before[:-1, None], 0) + by_place[0])

    def _zeros(self, *shape: int) -> Numbers:
        return np.zeros(shape, dtype=self._dtype)


def _uses(tie: int, load: GroupLoad) -> int:
    return int(tie in load.ties)


def _clipped(numbers: Numbers) -> Ints:
    starts, ends = np.ogrid[: numbers.shape[0], : numbers.shape[1]]
    return np.where(ends >= starts, np.minimum(numbers, BEYOND_BYTES), 0).astype(np.int64)


def _most(table: CostTable) -> int:
    """More than any sum of a table's figures is."""

    def of(load: GroupLoad) -> int:
        own = (
            load.weights_bytes
            + load.group.loading_bytes
            + load.buffers_bytes
            + load.logits_bytes
            + sum(load.transient_bytes)
        )
        return own + load.kv_bytes_per_position * (table.positions + 1)

    replay = table.replay
    held = sum(num_bytes for of_group in replay.held for _, num_bytes in of_group)
    arrived = sum(num_bytes for of_group in replay.arrived for _, _, num_bytes in of_group)
    lasting = sum(num_bytes for _, num_bytes in table.lasting)
    return sum(map(of, table.loads)) + held + arrived + lasting + sum(table.tied_bytes) * len(table.loads)
