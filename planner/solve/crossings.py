"""What tensors cost that enter and leave a run of units, by where they come from and go to.

With links that are all alike a run decides alone what crosses its ends. With unlike ones it also matters where others
are: the stage before and after (for a tensor that goes from one unit to the next), and the home of inputs and results.
Where any other unit is may be known in part; a tensor from or to it is taken to use the best link from or to any of the
places that it may be at, which makes the cost a bound from below. Knowing more makes it exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

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
Side = tuple[Costs, Costs]
"""What enters a run and what leaves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of where units are.

    `places` are the link groups that a unit may be on, for those that may not be on all; `reached` pairs a flow, by its
    number, with a link group that one of its readers is on.
    """

    places: Mapping[int, frozenset[int]] = field(default_factory=dict)
    reached: frozenset[tuple[int, int]] = frozenset()


NOTHING_KNOWN = Known()


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFlow:
    """A flow between units; None is the home of inputs and results, `FLOATING` the unit without a place in the chain.

    `costs` is by link group of source and target.
    """

    number: int
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
        self._known = NOTHING_KNOWN
        price = self._blocked if forbidden else self._nanoseconds
        self._unit_of = {m: index for index, unit in zip(place, problem.units, strict=True) for m in unit.members}
        beside = None if times.inputs_beside is None else self._unit_of[times.inputs_beside]
        self.flows = list(self._unit_flows(times.flows, beside, price))
        groups = range(len(self._everywhere))
        self._steps = [[self._stepping(source, target) for target in groups] for source in groups]
        self._counted: dict[tuple[Ends, Ends], Costs] = {}

    def narrowed(self, known: Known) -> Crossings:
        """The same, where so much is known of where units are."""
        narrowed = copy(self)
        narrowed._known = known
        return narrowed

    def sides(self, group: int, here: Ends) -> Side:
        """What enters and what leaves the run [start, end) on a device of link group `group`, but for steps.

        `here` is what else is on that device. A tensor leaves once, over the slowest of the links that it takes.
        """
        entering, leaving = self._nothing(), self._nothing()
        for flow in (flow for flow in self.flows if not flow.is_step):
            made_here = self._inside(frozenset({flow.producer}), here)
            entering += (~made_here & self._inside(flow.consumers, here)) * self._entering(flow, group)
            gone = [~self._all_inside(ends, here) * cost for ends, cost in self._leaving(flow, group)]
            leaving += made_here * np.maximum(np.maximum.reduce(gone), self._surely_leaving(flow, group))
        return entering, leaving

    def steps(self, source_group: int, target_group: int) -> Costs:
        """By the unit that a stage starts at, what goes over its boundary from one unit to the next."""
        return self._steps[source_group][target_group]

    def returns(self, group: int, here: Ends) -> Side:
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

    def cases(self, devices: Sequence[int], binding: Container[int], *, once: bool) -> list[Known]:
        """What may be known besides, case by case, about the unit or flow that hides most; nothing where none does.

        `devices` is a placement, by group; what enters and leaves those that are `binding` counts, or with `once` what
        `returns` counts.
        """
        at = {self._unit_of[member]: device for member, device in enumerate(devices)} | {None: 0}
        group = {unit: self._groups_of_links[device] for unit, device in at.items()}
        of_units: Counter[int] = Counter()
        of_flows: dict[tuple[int, int | None], int] = {}
        for flow in (flow for flow in self.flows if not flow.is_step):
            costs, source = flow.costs[group[flow.producer]], at[flow.producer]
            readers = [reader for reader in flow.consumers if at[reader] != source]
            if flow.producer is not None and not (once and self._is_return(flow)):
                entered = {group[reader] for reader in readers if once or at[reader] in binding}
                of_units[flow.producer] += sum(costs[other] - self._entering(flow, other) for other in entered)
            if readers and not once and source in binding:
                slowest = max(readers, key=lambda reader: (costs[group[reader]], reader or 0))
                known = self._surely_leaving(flow, group[flow.producer])
                known = max(known, *(min(costs[other] for other in self._groups(reader)) for reader in readers))
                of_flows[flow.number, slowest] = costs[group[slowest]] - known
        unit = max(sorted(of_units), key=lambda unit: of_units[unit], default=None)
        number, reader = max(of_flows, key=lambda pair: of_flows[pair], default=(0, None))
        if unit is not None and of_units[unit] >= max(1, of_flows.get((number, reader), 0)):
            return self._one_place_each(unit)
        if reader is None or not of_flows[number, reader]:
            return []
        flow = self.flows[number]
        if len(flow.consumers) == 1 or group[reader] == group[flow.producer]:
            return self._one_place_each(reader)
        return self._reached_or_not(flow, group[reader])

    def _one_place_each(self, unit: int) -> list[Known]:
        """The unit at one of its places after the other."""
        places = self._known.places
        return [
            replace(self._known, places={**places, unit: frozenset({group})}) for group in sorted(self._groups(unit))
        ]

    def _reached_or_not(self, flow: UnitFlow, group: int) -> list[Known]:
        """Some reader of the flow on this link group, or none."""
        known = self._known
        left = {reader: self._groups(reader) - {group} for reader in flow.consumers if reader is not None}
        reached = replace(known, reached=known.reached | {(flow.number, group)})
        return [reached, replace(known, places={**known.places, **left})] if all(left.values()) else [reached]

    def _is_return(self, flow: UnitFlow) -> bool:
        """Whether its producer has one reader, whose place is known."""
        return flow.producer is not None and len(flow.consumers) == 1 and self._is_known(*flow.consumers)

    def _is_known(self, end: int | None) -> bool:
        return len(self._groups(end)) == 1

    def _groups(self, end: int | None) -> frozenset[int]:
        """The link groups that a unit may be on, or that the home of inputs is on."""
        return frozenset({self._groups_of_links[0]}) if end is None else self._known.places.get(end, self._everywhere)

    def _entering(self, flow: UnitFlow, group: int) -> int:
        """The least price of a flow to a device of this link group."""
        return min(flow.costs[source][group] for source in self._groups(flow.producer))

    def _leaving(self, flow: UnitFlow, group: int) -> list[tuple[Ends, int]]:
        """Readers that may be at the same places, and the least price to them from a device of this link group."""
        alike: dict[frozenset[int], set[int | None]] = {}
        for reader in flow.consumers:
            alike.setdefault(self._groups(reader), set()).add(reader)
        return [(frozenset(ends), min(flow.costs[group][to] for to in places)) for places, ends in alike.items()]

    def _surely_leaving(self, flow: UnitFlow, group: int) -> int:
        """The most that a flow pays to link groups it is known to reach, where these are others."""
        reached = (to for number, to in self._known.reached if number == flow.number and to != group)
        return max((flow.costs[group][to] for to in reached), default=0)

    def _stepping(self, source_group: int, target_group: int) -> Costs:
        costs = np.zeros(self._num_units + 1, dtype=np.int64)
        for flow in self.flows:
            if flow.is_step and flow.producer is not None:
                costs[flow.producer + 1] += flow.costs[source_group][target_group]
        return costs

    def _nothing(self) -> Costs:
        return np.zeros((self._num_units, self._num_units + 1), dtype=np.int64)

    def _inside(self, ends: Ends, here: Ends) -> NDArray[np.bool_]:
        """Where any of these units lies in the run, or beside it."""
        return np.asarray(self._count_inside(ends, here) > 0)

    def _all_inside(self, ends: Ends, here: Ends) -> NDArray[np.bool_]:
        return np.asarray(self._count_inside(ends, here) == len(ends))

    def _count_inside(self, ends: Ends, here: Ends) -> Costs:
        """How many of these units lie in a run or beside it; remembered, because it is asked again and again."""
        if (ends, here) not in self._counted:
            marks = np.zeros(self._num_units + 1, dtype=np.int64)
            for end in ends - {None, FLOATING}:
                assert end is not None
                marks[end + 1] += 1
            before = np.cumsum(marks)
            starts, stops = np.ogrid[: self._num_units, : self._num_units + 1]
            self._counted[ends, here] = np.asarray(before[stops] - before[starts] + len(ends & here))
        return self._counted[ends, here]

    def _unit_flows(
        self,
        flows: tuple[FlowSize, ...],
        beside: int | None,
        price: Callable[[FlowSize, tuple[int, int]], int],
    ) -> list[UnitFlow]:
        """Flows that can cross. Inputs beside their reader come from nowhere, and results go to that unit."""
        found: list[UnitFlow] = []
        unit_of = self._unit_of
        for flow in flows:
            if flow.producer is None and beside is not None:
                continue
            producer = None if flow.producer is None else unit_of[flow.producer]
            consumers = frozenset(beside if reader is None else unit_of[reader] for reader in flow.consumers)
            if consumers - {producer}:
                costs = tuple(tuple(price(flow, pair) if pair else NO_LINK for pair in row) for row in self._pairs)
                found.append(
                    UnitFlow(number=len(found), producer=producer, consumers=consumers - {producer}, costs=costs)
                )
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
