"""Exact placement of a chain of units on unequal devices, for every objective, by dynamic programming.

A placement cuts the units, in execution order, into one contiguous stage per used device, devices in any order. The
recursion is over how many devices of each class are left: eight equal GPUs cost as much as one with a counter to eight,
sixteen that all differ 65,536 sets. Above `MAX_STATES` sets, or when time is short, only a few orders of devices are
tried, and the answer carries its distance from a bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from planner.errors import ConstraintError
from planner.problem import NO_KV, TIMED, PlacedStage, Problem, Solution, Status, evaluate
from planner.solve.bounds import unlimited_bound
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
    device. It is FEASIBLE, with a bound, where not every set of devices could be tried, or links that differ leave a
    tensor's way open.
    Raises: ConstraintError when pins or forbidden links exclude every placement, or a timed objective meets a device of
    unknown speed.
    """
    return _Chain(problem, time_limit_s).solution()


def fits(problem: Problem) -> bool:
    """Whether any placement fits."""
    return _Chain(replace(problem, objective="fewest"), None).holds()


class _Chain:
    """One problem, and the searches that together answer it: one per order of devices and place of the hub."""

    def __init__(self, problem: Problem, time_limit_s: float | None) -> None:
        self._problem = problem
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._segments = Segments(problem)
        if problem.objective in TIMED and not self._segments.has_times:
            unknown = [d.name for d in problem.machine.devices if not (d.bandwidth_bytes_per_s and d.flops_per_s)]
            raise ConstraintError(
                f"the objective {problem.objective} needs the speed of {', '.join(unknown)}: name GPU models "
                "(--gpus rtx4090,a100-80g), or give bandwidth and flops in a machine file"
            )

    def holds(self) -> bool:
        """Whether any search finds a placement."""
        return any(
            len(search.coverable(Bar(), self._usable(states)))
            for states in self._families()
            for search in self._searches(states)
        )

    def solution(self) -> Solution:
        """The best of what the searches find."""
        exact = self._is_small
        found: list[tuple[int, tuple[PlacedStage, ...]]] = []
        method = METHOD if exact else UNFINISHED
        if not exact or self._deadline is not None:
            found = [one for order in self._orders() for one in self._found(self._states(order))]
        if exact:
            try:
                found = list(self._found(self._states(deadline=self._deadline)))
            except OutOfTime:
                exact, method = False, OUT_OF_TIME
        if not found:
            return self._nearest_misfit()
        return self._judged(found, method, exact=exact)

    def _judged(self, found: list[tuple[int, tuple[PlacedStage, ...]]], method: str, *, exact: bool) -> Solution:
        """The best of the placements found, by the evaluator, beside the best that the searches thought possible."""
        problem = self._problem
        stages = min((stages for _, stages in found), key=lambda stages: _rank(problem, stages))
        self._refuse_forbidden(stages)
        value = evaluate(problem, stages).value(problem)
        assert value is not None  # timed objectives were refused without speeds
        timed = problem.objective in TIMED
        best = min if timed else max
        bound = best(bound for bound, rival in found if timed or len(rival) == len(stages))
        most_or_fewest = len(problem.machine.devices) if problem.objective == "balance" else 1
        proven = exact or timed or len(stages) == most_or_fewest
        if not exact:
            bound = best(value, unlimited_bound(self._segments))
        status: Status = "OPTIMAL" if value == bound and proven else "FEASIBLE"
        return Solution(
            status=status, stages=stages, value=value, bound=bound, method=method, objective=problem.objective
        )

    def _found(self, states: States) -> Iterator[tuple[int, tuple[PlacedStage, ...]]]:
        """The objective's best value and a placement, for each place that the hub may be at."""
        for search in self._searches(states):
            options = search.coverable(Bar(), self._usable(states))
            if len(options):
                yield self._best(search, states, options)

    def _best(self, search: Search, states: States, options: Ints) -> tuple[int, tuple[PlacedStage, ...]]:
        used = states.used[options]
        if self._problem.objective == "latency":
            return search.shortest_sum(options)
        if self._problem.objective == "throughput":
            return search.fastest_pipeline(options)
        wanted = used.max() if self._problem.objective == "balance" else used.min()
        return search.most_extra(options[used == wanted])

    def _nearest_misfit(self) -> Solution:
        """The placement whose worst device lacks the fewest bytes."""
        found = [
            misfit
            for states in self._families()
            for search in self._searches(states)
            if (misfit := search.least_relief(self._usable(states))) is not None
        ]
        if not found:
            cause = "--all-devices and the pins" if self._problem.all_devices else "the pins"
            links = " and forbidden links" if self._segments.has_forbidden else ""
            raise ConstraintError(
                f"{cause}{links} leave no legal placement, whatever the memory: a device holds one contiguous run of "
                "modules in execution order. Pin fewer modules, or neighbours to one device."
            )
        relief_bytes, stages = min(found, key=lambda misfit: misfit[0])
        if not relief_bytes:  # it fits, and time ran out before that was seen
            return self._judged([(0 if self._problem.objective in TIMED else NO_KV, stages)], OUT_OF_TIME, exact=False)
        return Solution(
            status="INFEASIBLE", stages=stages, value=0, bound=0, method=METHOD, objective=self._problem.objective
        )

    def _families(self) -> Iterator[States]:
        """All sets of devices, or those of a few orders where there are too many."""
        yield from [self._states()] if self._is_small else map(self._states, self._orders())

    @property
    def _is_small(self) -> bool:
        """Whether all sets of devices can be tried."""
        return prod(len(kind.positions) + 1 for kind in self._segments.classes) <= MAX_STATES

    def _states(self, order: Sequence[int] | None = None, deadline: float | None = None) -> States:
        return States(self._segments.classes, self._segments.num_units, deadline, order)

    def _searches(self, states: States) -> Iterator[Search]:
        for hub_group in range(self._segments.num_link_groups):
            yield Search(self._segments, states, hub_group)

    def _usable(self, states: States) -> Ints:
        """The states that the problem allows: all, or only the one with every device."""
        wanted = len(self._problem.machine.devices) if self._problem.all_devices else 1
        return np.flatnonzero(states.used >= wanted)

    def _orders(self) -> list[list[int]]:
        """Orders of classes worth trying alone: as the machine lists them, by memory, by speed, and backwards."""
        classes = self._segments.classes
        keys: list[Callable[[int], float]] = [
            lambda kind: float(kind),
            lambda kind: float(classes[kind].capacity_bytes),
            lambda kind: classes[kind].device.bandwidth_bytes_per_s or 0.0,
        ]
        return [sorted(range(len(classes)), key=key, reverse=back) for key in keys for back in (False, True)]

    def _refuse_forbidden(self, stages: tuple[PlacedStage, ...]) -> None:
        if not self._segments.has_forbidden:
            return
        devices = {member: stage.device for stage in stages for member in stage.members}
        pairs = self._problem.times.forbidden_copies([devices[member] for member in range(len(devices))])
        if pairs:
            source, target = (self._problem.machine.devices[position].name for position in pairs[0])
            raise ConstraintError(
                f"no placement was found that keeps off forbidden links: the best one sends from {source} to {target}. "
                "Allow that link, or pin what sends over it."
            )


def _rank(problem: Problem, stages: tuple[PlacedStage, ...]) -> tuple[float, ...]:
    """The smaller the better, as the objective and its ties say."""
    evaluation = evaluate(problem, stages)
    value = evaluation.value(problem) or 0
    used = -len(stages) if problem.objective == "balance" else len(stages)
    goal = (value,) if problem.objective in TIMED else (used, -value)
    order = [number for stage in stages for number in (stage.device, -len(stage.members))]
    return (*goal, -evaluation.free_fraction, used, *order)
