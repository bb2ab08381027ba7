"""What tensors cost that enter and leave a run of units, by where they come from and go to.

With links that are all alike a run decides alone what crosses its ends. With unlike ones it also matters where others
are: the stage before and after (for a tensor that goes from one unit to the next), the hub (the one unit that sends to
many, or gets from far, such as the token embedding), and the home of inputs and results. A tensor between any other
places is taken to use the best link there is, which makes the cost a bound from below.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.machine import Machine
from planner.problem import Problem
from planner.timing import FlowSize, TimeTable, link_between

NO_LINK = 2**50
"""The price of sending from a device to itself through a link: more than any real one."""

FLOATING = -2
"""The unit that is in no order: not next to any in a chain, which are numbered from 0."""

Costs = NDArray[np.int64]
Ends = frozenset[int | None]
"""Units that send or read; `None` is the home of inputs and results."""
End = Literal["own", "beside", "hub", "home", "any"]
"""Where the other end of a tensor is, as seen from a run: the next stage or the one before is `beside` it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFlow:
    """A flow between units; None is the home of inputs and results, `FLOATING` the unit without a place in the chain.

    `costs` is by link group of source and target.
    """

    producer: int | None
    consumers: Ends
    costs: tuple[tuple[int, ...], ...]

    @property
    def is_step(self) -> bool:
        """Whether it goes from one unit to the next and nowhere else."""
        return self.producer is not None and self.consumers == {self.producer + 1}


def link_groups(machine: Machine) -> list[int]:
    """A number for every device, equal for two between which swapping would change no link."""
    count = len(machine.devices)
    links = [
        [_quality(machine, source, target) if source != target else None for target in range(count)]
        for source in range(count)
    ]
    groups: list[int] = []
    first_of: list[int] = []
    for device in range(count):
        twin = next((group for group, other in enumerate(first_of) if _are_twins(links, device, other)), None)
        if twin is None:
            twin = len(first_of)
            first_of.append(device)
        groups.append(twin)
    return groups


class Crossings:
    """The flows of a problem between its units, priced for each pair of link groups.

    `place` is where each of the problem's units stands in the chain. Prices are nanoseconds, or with `forbidden` the
    number of tensors on links that may not be used.
    """

    def __init__(
        self,
        problem: Problem,
        times: TimeTable,
        groups_of_links: list[int],
        place: Sequence[int],
        *,
        forbidden: bool = False,
    ) -> None:
        self._num_units = sum(index != FLOATING for index in place)
        self._pairs = _representatives(groups_of_links)
        self._machine = problem.machine
        self._new_tokens = times.new_tokens
        self._home_group = groups_of_links[0]
        price = self._blocked if forbidden else self._nanoseconds
        unit_of = {m: index for index, unit in zip(place, problem.units, strict=True) for m in unit.members}
        beside = None if times.inputs_beside is None else unit_of[times.inputs_beside]
        self.flows = list(self._unit_flows(times.flows, unit_of, beside, price))
        self.hub = _hub(self.flows)

    def sides(self, group: int, hub: int, here: Ends) -> tuple[Costs, Costs]:
        """What enters and what leaves the run [start, end) on a device of link group `group`, but for steps.

        `here` is what else is on that device.
        """
        shape = (self._num_units, self._num_units + 1)
        entering, leaving = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for flow in (flow for flow in self.flows if not flow.is_step):
            made_here = self._inside(frozenset({flow.producer}), here)
            read_here = self._inside(flow.consumers, here)
            read_elsewhere = ~self._all_inside(flow.consumers, here)
            entering += (~made_here & read_here) * self._best(flow, self._source(flow), "own", group, hub)
            leaving += (made_here & read_elsewhere) * self._best(flow, "own", self._target(flow), group, hub)
        return entering, leaving

    def steps(self, source_group: int, target_group: int) -> Costs:
        """By the unit that a stage starts at, what goes over its boundary from one unit to the next."""
        costs = np.zeros(self._num_units + 1, dtype=np.int64)
        for flow in self.flows:
            if flow.is_step and flow.producer is not None:
                costs[flow.producer + 1] += flow.costs[source_group][target_group]
        return costs

    def returns(self, group: int, hub: int, here: Ends) -> tuple[Costs, Costs]:
        """As `sides`, but each copy once: at the end whose partner's place is known, for a sum over all stages."""
        shape = (self._num_units, self._num_units + 1)
        entering, leaving = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for flow in (flow for flow in self.flows if not flow.is_step):
            made_here = self._inside(frozenset({flow.producer}), here)
            if flow.producer is not None and self._target(flow) != "any":
                gone = made_here & ~self._all_inside(flow.consumers, here)
                leaving += gone * self._best(flow, "own", self._target(flow), group, hub)
            else:
                come = ~made_here & self._inside(flow.consumers, here)
                entering += come * self._best(flow, self._source(flow), "own", group, hub)
        return entering, leaving

    def _source(self, flow: UnitFlow) -> End:
        if flow.producer is None:
            return "home"
        return "hub" if flow.producer == self.hub else "any"

    def _target(self, flow: UnitFlow) -> End:
        if flow.consumers == frozenset({None}):
            return "home"
        return "hub" if flow.consumers == frozenset({self.hub}) else "any"

    def _best(self, flow: UnitFlow, source: End, target: End, group: int, hub: int) -> int:
        """The price over the link from `source` to `target`, or over the best of those it may be."""
        sources, targets = self._candidates(source, group, hub), self._candidates(target, group, hub)
        return min(flow.costs[a][b] for a in sources for b in targets)

    def _candidates(self, end: End, group: int, hub: int) -> list[int]:
        known = {"own": [group], "hub": [hub], "home": [self._home_group]}
        return known.get(end, list(range(len(self._pairs))))

    def _inside(self, ends: Ends, here: Ends) -> NDArray[np.bool_]:
        """Where any of these units lies in the run, or beside it."""
        return np.asarray(self._count_inside(ends, here) > 0)

    def _all_inside(self, ends: Ends, here: Ends) -> NDArray[np.bool_]:
        return np.asarray(self._count_inside(ends, here) == len(ends))

    def _count_inside(self, ends: Ends, here: Ends) -> Costs:
        marks = np.zeros(self._num_units + 1, dtype=np.int64)
        for end in ends - {None, FLOATING}:
            assert end is not None
            marks[end + 1] += 1
        before = np.cumsum(marks)
        starts, stops = np.ogrid[: self._num_units, : self._num_units + 1]
        return np.asarray(before[stops] - before[starts] + len(ends & here))

    def _unit_flows(
        self,
        flows: tuple[FlowSize, ...],
        unit_of: dict[int, int],
        beside: int | None,
        price: Callable[[FlowSize, tuple[int, int]], int],
    ) -> list[UnitFlow]:
        """Flows that can cross. Inputs beside their reader come from nowhere, and results go to that unit."""
        found = []
        for flow in flows:
            if flow.producer is None and beside is not None:
                continue
            producer = None if flow.producer is None else unit_of[flow.producer]
            consumers = frozenset(beside if reader is None else unit_of[reader] for reader in flow.consumers)
            if consumers - {producer}:
                costs = tuple(tuple(price(flow, pair) if pair else NO_LINK for pair in row) for row in self._pairs)
                found.append(UnitFlow(producer=producer, consumers=consumers - {producer}, costs=costs))
        return found

    def _nanoseconds(self, flow: FlowSize, pair: tuple[int, int]) -> int:
        return flow.times(link_between(self._machine, *pair)).request_ns(self._new_tokens)

    def _blocked(self, flow: FlowSize, pair: tuple[int, int]) -> int:
        return 0 if link_between(self._machine, *pair).allowed else 1


def _hub(flows: list[UnitFlow]) -> int | None:
    """The unit with most flows that are no steps."""
    ends: Counter[int] = Counter()
    for flow in flows:
        if not flow.is_step:
            ends.update({flow.producer} - {None})  # type: ignore[arg-type]  # None is taken out
            ends.update(flow.consumers - {None} if len(flow.consumers) == 1 else ())  # type: ignore[arg-type]
    return max(sorted(ends), key=lambda unit: ends[unit], default=None)


def _quality(machine: Machine, source: int, target: int) -> tuple[float, float, bool]:
    link = link_between(machine, source, target)
    return (link.bandwidth_bytes_per_s, link.latency_s, True) if link.allowed else (0.0, 0.0, False)


def _are_twins(links: list[list[tuple[float, float, bool] | None]], one: int, other: int) -> bool:
    others = [device for device in range(len(links)) if device not in (one, other)]
    return links[one][other] == links[other][one] and all(
        links[one][device] == links[other][device] and links[device][one] == links[device][other] for device in others
    )


def _representatives(groups: list[int]) -> list[list[tuple[int, int] | None]]:
    """By link group of source and target, two different devices of these groups; None where there are no two."""
    pairs: list[list[tuple[int, int] | None]] = [[None] * (max(groups) + 1) for _ in range(max(groups) + 1)]
    for source, source_group in enumerate(groups):
        for target, target_group in enumerate(groups):
            if source != target and pairs[source_group][target_group] is None:
                pairs[source_group][target_group] = (source, target)
    return pairs
