"""What tensors cost that enter and leave a run of units, by where they come from and go to.

With links that are all alike a run decides alone what crosses its ends. With unlike ones it also matters where others
are: the stage before and after (for a tensor that goes from one unit to the next), and the home of inputs and results.
Any other unit is at one of its places, link groups that it may be on; a tensor from or to it is taken to use the best
link from or to any of these, which makes the cost a bound from below, exact once every such unit has one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

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
Places = Mapping[int, frozenset[int]]
"""Link groups that a unit may be on, for those that may not be on all."""
ANYWHERE: Places = {}


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
        self._groups_of_links = groups_of_links
        self._everywhere = frozenset(groups_of_links)
        self._places = ANYWHERE
        price = self._blocked if forbidden else self._nanoseconds
        self._unit_of = {m: index for index, unit in zip(place, problem.units, strict=True) for m in unit.members}
        beside = None if times.inputs_beside is None else self._unit_of[times.inputs_beside]
        self.flows = list(self._unit_flows(times.flows, beside, price))

    def narrowed(self, places: Places) -> Crossings:
        """The same, where units may only be at these places."""
        narrowed = copy(self)
        narrowed._places = places
        return narrowed

    def sides(self, group: int, here: Ends) -> tuple[Costs, Costs]:
        """What enters and what leaves the run [start, end) on a device of link group `group`, but for steps.

        `here` is what else is on that device. A tensor leaves once, over the slowest of the links that it takes.
        """
        entering, leaving = self._nothing(), self._nothing()
        for flow in (flow for flow in self.flows if not flow.is_step):
            made_here = self._inside(frozenset({flow.producer}), here)
            entering += (~made_here & self._inside(flow.consumers, here)) * self._entering(flow, group)
            gone = [~self._all_inside(ends, here) * cost for ends, cost in self._leaving(flow, group)]
            leaving += made_here * np.maximum.reduce(gone)
        return entering, leaving

    def steps(self, source_group: int, target_group: int) -> Costs:
        """By the unit that a stage starts at, what goes over its boundary from one unit to the next."""
        costs = np.zeros(self._num_units + 1, dtype=np.int64)
        for flow in self.flows:
            if flow.is_step and flow.producer is not None:
                costs[flow.producer + 1] += flow.costs[source_group][target_group]
        return costs

    def returns(self, group: int, here: Ends) -> tuple[Costs, Costs]:
        """As `sides`, but each copy once, for a sum over all stages: where its only reader's place is known, there."""
        entering, leaving = self._nothing(), self._nothing()
        for flow in (flow for flow in self.flows if not flow.is_step):
            made_here = self._inside(frozenset({flow.producer}), here)
            if self._is_return(flow):
                ((ends, cost),) = self._leaving(flow, group)
                leaving += (made_here & ~self._all_inside(ends, here)) * cost
            else:
                entering += (~made_here & self._inside(flow.consumers, here)) * self._entering(flow, group)
        return entering, leaving

    def doubt(self, devices: Sequence[int], *, once: bool) -> int | None:
        """The unit whose place hides most of what crosses in a placement, by group; None where nothing is hidden.

        With `once` each copy is looked at where `returns` counts it, and else at both ends, as `sides` does.
        """
        at = {self._unit_of[member]: device for member, device in enumerate(devices)} | {None: 0}
        group = {unit: self._groups_of_links[device] for unit, device in at.items()}
        hidden: Counter[int] = Counter()
        for flow in (flow for flow in self.flows if not flow.is_step):
            for reader in (reader for reader in flow.consumers if at[reader] != at[flow.producer]):
                real = flow.costs[group[flow.producer]][group[reader]]
                if flow.producer is not None and not (once and self._is_return(flow)):
                    hidden[flow.producer] += real - self._entering(flow, group[reader])
                if reader is not None and not once:
                    best = min(flow.costs[group[flow.producer]][other] for other in self._groups(reader))
                    hidden[reader] = max(hidden[reader], real - best)
        most = max(sorted(hidden), key=lambda unit: hidden[unit], default=None)
        return most if most is not None and hidden[most] else None

    def _is_return(self, flow: UnitFlow) -> bool:
        """Whether its producer has one reader, whose place is known."""
        return flow.producer is not None and len(flow.consumers) == 1 and self._is_known(*flow.consumers)

    def _is_known(self, end: int | None) -> bool:
        return len(self._groups(end)) == 1

    def _groups(self, end: int | None) -> frozenset[int]:
        """The link groups that a unit may be on, or that the home of inputs is on."""
        return frozenset({self._groups_of_links[0]}) if end is None else self._places.get(end, self._everywhere)

    def _entering(self, flow: UnitFlow, group: int) -> int:
        """The least price of a flow to a device of this link group."""
        return min(flow.costs[source][group] for source in self._groups(flow.producer))

    def _leaving(self, flow: UnitFlow, group: int) -> list[tuple[Ends, int]]:
        """Readers that may be at the same places, and the least price to them from a device of this link group."""
        alike: dict[frozenset[int], set[int | None]] = {}
        for reader in flow.consumers:
            alike.setdefault(self._groups(reader), set()).add(reader)
        return [(frozenset(ends), min(flow.costs[group][to] for to in places)) for places, ends in alike.items()]

    def _nothing(self) -> Costs:
        return np.zeros((self._num_units, self._num_units + 1), dtype=np.int64)

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
        beside: int | None,
        price: Callable[[FlowSize, tuple[int, int]], int],
    ) -> list[UnitFlow]:
        """Flows that can cross. Inputs beside their reader come from nowhere, and results go to that unit."""
        found, unit_of = [], self._unit_of
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
