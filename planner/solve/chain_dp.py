"""Exact placement of a chain of units on unequal devices, for every objective, by dynamic programming.

A placement cuts the units, in execution order, into one contiguous stage per used device, devices in any order. The
recursion is over how many devices of each class are left: eight equal GPUs cost as much as one with a counter to eight,
sixteen that all differ 65,536 sets. Above `MAX_STATES` sets, or when time is short, only a few orders of devices are
tried, and the answer carries its distance from a bound.

A unit without parameters or KV cache, such as rotary positions, is in the chain like any other; where the slowest stage
counts it floats as well: it may be on any stage's device. Where there are several, the first one does, and a bound says
what the others could save.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod

from planner.errors import ConstraintError
from planner.memory import CostTable
from planner.problem import NO_KV, TIMED, PlacedStage, Problem, Solution, Status, evaluate
from planner.solve import bounds
from planner.solve.orders import improved_order, orders_with_pins_late, plain_orders
from planner.solve.search import Bar, Search
from planner.solve.segments import Segments
from planner.solve.states import Ints, OutOfTime, States

MAX_STATES = 2**17
"""Sets of devices that are searched to the end: seconds, and some 100 MB."""

METHOD = "chain-dp"
UNFINISHED = "chain-dp, some orders of devices"
OUT_OF_TIME = "chain-dp, out of time: not reproducible"


def solve(problem: Problem, time_limit_s: float | None = None) -> Solution:
    """The best placement for the problem's objective; ties as `planner.solve.search` says.

    When nothing fits, the solution is INFEASIBLE and holds the placement that lacks the fewest bytes on its worst
    device; its method says whether that is proven. It is FEASIBLE, with a bound, where not every set of devices could
    be tried, or links that differ leave a tensor's way open, unless it reaches the bound.
    Raises: ConstraintError when pins or forbidden links exclude every placement, or a timed objective meets a device of
    unknown speed.
    """
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    try:
        return _solved(problem, deadline)
    except _OverForbiddenLinkError as refused:
        around = [found for rival in _without_an_end(problem) if (found := _if_legal(rival, deadline)) is not None]
        if not around:
            raise
        best = min(around, key=lambda found: rank(problem, found.stages))
        bound = min(refused.bound, best.value) if problem.objective in TIMED else max(refused.bound, best.value)
        status: Status = "OPTIMAL" if problem.objective in TIMED and best.value == bound else "FEASIBLE"
        return replace(best, status=status, bound=bound, method=f"{best.method}, around forbidden links")


def _solved(problem: Problem, deadline: float | None) -> Solution:
    floating = _floating_units(problem)
    if not floating:
        return Chain(problem, deadline).solution()
    found = _with_one_afloat(problem, deadline, floating[0])
    if len(floating) == 1 or found.status == "INFEASIBLE":
        return found
    # The others stay in the chain: where they could be instead is bounded by what there is without them.
    free = _with_one_afloat(_without_work(problem, floating[1:]), deadline, floating[0])
    bound = min(found.bound, free.bound)
    return replace(found, bound=bound, status="OPTIMAL" if found.value == bound else "FEASIBLE")


def _with_one_afloat(problem: Problem, deadline: float | None, floating: int) -> Solution:
    in_order = Chain(problem, deadline).solution()
    afloat = Chain(problem, deadline, Segments(problem, floating))
    if in_order.status != "INFEASIBLE":
        return afloat.improved(in_order)
    return afloat.solution() if afloat.holds() else in_order  # its activations may fit elsewhere


def _without_work(problem: Problem, idle: Sequence[int]) -> Problem:
    """The problem with these units taking no time, and nothing going to them or coming from them."""
    members = {member for index in idle for member in problem.units[index].members}
    names = {problem.graph.groups[member].id for member in members}
    groups = (
        replace(group, encode=None, prefill=None, decode=None) if group.id in names else group
        for group in problem.graph
    )
    flows = (
        replace(flow, consumers=tuple(name for name in flow.consumers if name not in names))
        for flow in problem.graph.flows
        if flow.producer not in names
    )
    graph = replace(problem.graph, groups=tuple(groups), flows=tuple(flow for flow in flows if flow.consumers))
    return replace(problem, graph=graph, table=CostTable.of(graph, problem.quantities))


class _OverForbiddenLinkError(ConstraintError):
    """The best placement of a search sends over a link that is not allowed; `bound` is what it was thought worth."""

    def __init__(self, message: str, *, bound: int) -> None:
        super().__init__(message)
        self.bound = bound


def _without_an_end(problem: Problem) -> Iterator[Problem]:
    """The problem without room on one end of a forbidden link, for every such end."""
    ends = {name for link in problem.machine.links if not link.allowed for name in (link.source, link.target)}
    for position, device in enumerate(problem.machine.devices):
        if device.name in ends:
            devices = list(problem.machine.devices)
            devices[position] = replace(device, memory_bytes=1)
            yield replace(problem, machine=replace(problem.machine, devices=tuple(devices)))


def _if_legal(problem: Problem, deadline: float | None) -> Solution | None:
    """The solution, where one fits and keeps off forbidden links."""
    try:
        found = _solved(problem, deadline)
    except ConstraintError:
        return None
    return None if found.status == "INFEASIBLE" else found


def fits(problem: Problem) -> bool:
    """Whether any placement fits."""
    return Chain(replace(problem, objective="fewest"), None).holds()


def _floating_units(problem: Problem) -> list[int]:
    """The units that weigh nothing and are bound to nothing, where their place matters; never all of them.

    For `balance` it would buy a few positions with a copy per token, and a request of one stream gains nothing by it.
    """
    if problem.objective != "throughput" or any(not link.allowed for link in problem.machine.links):
        return []
    found = []
    for index, unit in enumerate(problem.units):
        groups = [problem.graph.groups[member] for member in unit.members]
        weighs = any(group.num_parameters or group.kv_bytes_per_position or group.module_list for group in groups)
        if not weighs and unit.pinned is None:
            found.append(index)
    return found if len(found) < len(problem.units) else found[1:]


Found = tuple[int, tuple[PlacedStage, ...]]
"""The best value that a search thought possible, and the placement it found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What searches found; `exact` where they tried every set of devices."""

    found: list[Found]
    method: str
    exact: bool


class Chain:
    """One problem, and the searches that together answer it: one per order of devices and place of the hub.

    `segments` are the problem's, unless its runs may be other ones.
    """

    def __init__(self, problem: Problem, deadline: float | None, segments: Segments | None = None) -> None:
        self._problem = problem
        self._deadline = deadline
        self._segments = segments or Segments(problem)
        if problem.objective in TIMED and not self._segments.has_times:
            unknown = [d.name for d in problem.machine.devices if not (d.bandwidth_bytes_per_s and d.flops_per_s)]
            raise ConstraintError(
                f"the objective {problem.objective} needs the speed of {', '.join(unknown)}: name GPU models "
                "(--gpus rtx4090,a100-80g), or give bandwidth and flops in a machine file"
            )

    def holds(self) -> bool:
        """Whether any search finds a placement."""
        return not self._cannot_fit and any(
            len(search.coverable(Bar(), self._usable(states)))
            for states in self._families()
            for search in self._searches(states)
        )

    def solution(self) -> Solution:
        """The best of what the searches find."""
        tried = self.tried()
        if not tried.found:
            return self._nearest_misfit()
        return self._judged(tried)

    def tried(self) -> Tried:
        """What the searches find; by a few orders of devices where there are too many sets, or no time for them."""
        if self._is_small:
            try:
                found = list(self._found(self._states(deadline=self._deadline)))
                return Tried(found=found, method=METHOD, exact=True)
            except OutOfTime:
                pass
        found = [one for order in self._orders() for one in self._found(self._states(order))]
        return Tried(found=found, method=OUT_OF_TIME if self._is_small else UNFINISHED, exact=False)

    def improved(self, in_order: Solution) -> Solution:
        """The best pipeline with the floating unit anywhere, from the best with it in its place."""
        exact, method, faster = self._is_small, in_order.method, []
        try:
            for states in self._families(self._deadline):
                for search in self._searches(states):
                    better = search.faster_pipeline(self._usable(states), in_order.value)
                    faster += [better] if better else []
        except OutOfTime:
            exact, method = False, OUT_OF_TIME
        return self._judged(Tried(found=[(in_order.bound, in_order.stages), *faster], method=method, exact=exact))

    def _judged(self, tried: Tried) -> Solution:
        """The best of the placements found, by the evaluator, beside the best that the searches thought possible."""
        problem, found, exact = self._problem, tried.found, tried.exact
        stages = min((stages for _, stages in found), key=lambda stages: rank(problem, stages))
        value = evaluate(problem, stages).value(problem)
        assert value is not None  # timed objectives were refused without speeds
        timed = problem.objective in TIMED
        best = min if timed else max
        bound = best(bound for bound, rival in found if timed or len(rival) == len(stages))
        self._refuse_forbidden(stages, bound)
        proven = exact or timed
        if not exact:
            bound = best(value, bounds.bound(self._segments, len(stages)))
            all_devices, fewest = len(problem.machine.devices), bounds.fewest_devices(self._segments)
            proven = timed or len(stages) == (all_devices if problem.objective == "balance" else fewest)
        status: Status = "OPTIMAL" if value == bound and proven else "FEASIBLE"
        return Solution(
            status=status, stages=stages, value=value, bound=bound, method=tried.method, objective=problem.objective
        )

    def _found(self, states: States) -> Iterator[Found]:
        """The objective's best value and a placement, for each place that the hub may be at."""
        for search in self._searches(states):
            options = search.coverable(Bar(), self._usable(states))
            if len(options):
                yield self._best(search, states, options)

    def _best(self, search: Search, states: States, options: Ints) -> Found:
        used = states.used[options]
        if self._problem.objective == "latency":
            return search.shortest_sum(options)
        if self._problem.objective == "throughput":
            return search.fastest_pipeline(options)
        wanted = used.max() if self._problem.objective == "balance" else used.min()
        return search.most_extra(options[used == wanted])

    def _nearest_misfit(self) -> Solution:
        """The placement whose worst device lacks the fewest bytes, of two orders where not all can be tried."""
        is_pinned = any(unit.pinned is not None for unit in self._problem.units)
        found = [
            misfit
            for states in islice(self._families(), None if is_pinned else 2)
            for search in self._searches(states)
            if (misfit := search.least_relief(self._usable(states))) is not None
        ]
        if not found:
            cause = "--all-devices and the pins" if self._problem.all_devices else "the pins"
            links = " and forbidden links" if self._segments.has_forbidden else ""
            none = "leave no legal placement, whatever the memory"
            if not self._is_small:
                none = f"leave no legal placement that was found, of so many devices in {len(self._orders())} orders"
            raise ConstraintError(
                f"{cause}{links} {none}: a device holds one contiguous run of "
                "modules in execution order. Pin fewer modules, or neighbours to one device."
            )
        relief_bytes, stages = min(found, key=lambda misfit: misfit[0])
        if not relief_bytes:  # it fits, and time ran out before that was seen
            unknown = 0 if self._problem.objective in TIMED else NO_KV
            return self._judged(Tried(found=[(unknown, stages)], method=OUT_OF_TIME, exact=False))
        method = METHOD if self._is_small or self._cannot_fit else UNFINISHED
        objective = self._problem.objective
        return Solution(status="INFEASIBLE", stages=stages, value=0, bound=0, method=method, objective=objective)

    def _families(self, deadline: float | None = None) -> Iterator[States]:
        """All sets of devices, or those of a few orders where there are too many."""
        yield from [self._states(deadline=deadline)] if self._is_small else map(self._states, self._orders())

    @property
    def _cannot_fit(self) -> bool:
        """Whether a bound says that nothing fits; asked where not all sets of devices can be tried."""
        return not self._is_small and bounds.fewest_devices(self._segments) > len(self._problem.machine.devices)

    @property
    def _is_small(self) -> bool:
        """Whether all sets of devices can be tried."""
        return prod(len(kind.positions) + 1 for kind in self._segments.classes) <= MAX_STATES

    def _states(self, order: Sequence[int] | None = None, deadline: float | None = None) -> States:
        return States(self._segments, deadline, order)

    def _searches(self, states: States) -> Iterator[Search]:
        for hub_group in range(self._segments.num_link_groups):
            yield Search(self._segments, states, hub_group)

    def _usable(self, states: States) -> Ints:
        """The states that the problem allows: all, or only the one with every device."""
        wanted = len(self._problem.machine.devices) if self._problem.all_devices else 1
        return states.usable(wanted)

    def _orders(self) -> list[list[int]]:
        """Orders of classes worth trying alone."""
        segments = self._segments
        few = orders_with_pins_late(segments) if self._problem.objective in ("fewest", "latency") else []
        return [*plain_orders(segments), *few, improved_order(segments)]

    def _refuse_forbidden(self, stages: tuple[PlacedStage, ...], bound: int) -> None:
        if not self._segments.has_forbidden:
            return
        devices = {member: stage.device for stage in stages for member in stage.members}
        pairs = self._problem.times.forbidden_copies([devices[member] for member in range(len(devices))])
        if pairs:
            source, target = (self._problem.machine.devices[position].name for position in pairs[0])
            raise _OverForbiddenLinkError(
                f"no placement was found that keeps off forbidden links: the best one sends from {source} to {target}. "
                "Allow that link, or pin what sends over it.",
                bound=bound,
            )


def rank(problem: Problem, stages: tuple[PlacedStage, ...]) -> tuple[float, ...]:
    """The smaller the better, as the objective and its ties say."""
    evaluation = evaluate(problem, stages)
    value = evaluation.value(problem) or 0
    used = -len(stages) if problem.objective == "balance" else len(stages)
    goal = (value,) if problem.objective in TIMED else (used, -value)
    order = [number for stage in stages for number in (stage.device, -len(stage.members))]
    return (*goal, -evaluation.free_fraction, used, *order)
