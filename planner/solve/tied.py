"""The best placement where tied weights may be kept several times: with their users apart, or with them together.

Of three users and more some may be together and others apart; such placements are not looked at, and the answer is then
FEASIBLE.
"""

from __future__ import annotations

from dataclasses import replace

from planner.constraints import Unit
from planner.graph import Tie
from planner.problem import TIMED, Problem, Solution, rank
from planner.solve import near_home


def solve(problem: Problem, time_limit_s: float | None = None) -> Solution:
    """As `near_home.solve`; where the graph has ties, the better of what is best with and without second copies."""
    apart = near_home.solve(problem, time_limit_s)
    merged = _merged_units(problem)
    if merged is None:
        return apart
    together = near_home.solve(replace(problem, units=merged), time_limit_s)
    fitting = [found for found in (together, apart) if found.status != "INFEASIBLE"]
    if len(fitting) < 2:
        return fitting[0] if fitting else apart
    best = min(fitting, key=lambda found: rank(problem, found.stages))
    reached = [found.bound for found in fitting if len(found.stages) == len(best.stages)]
    bound = min(found.bound for found in fitting) if problem.objective in TIMED else max(reached)
    is_proven = best.value == bound and all(found.status == "OPTIMAL" for found in fitting) and _is_one_pair(problem)
    return replace(best, bound=bound, status="OPTIMAL" if is_proven else "FEASIBLE")


def _merged_units(problem: Problem) -> tuple[Unit, ...] | None:
    """The units with the users of each tied weight in one; None where they are already, or are pinned apart."""
    position = {group.id: i for i, group in enumerate(problem.graph)}
    units = list(problem.units)
    for tie in problem.graph.ties:
        users = [unit for unit in units if not set(unit.members).isdisjoint(_positions(tie, position))]
        pins = {unit.pinned for unit in users} - {None}
        if len(pins) > 1:
            return None
        first = units.index(users[0])
        units = [unit for unit in units if unit not in users]
        members = sorted(member for unit in users for member in unit.members)
        units.insert(first, Unit(members=tuple(members), pinned=next(iter(pins), None)))
    return None if len(units) == len(problem.units) else tuple(units)


def _is_one_pair(problem: Problem) -> bool:
    """Whether two units are all that share a weight, so that they can only be together or apart."""
    position = {group.id: i for i, group in enumerate(problem.graph)}
    users = [_positions(tie, position) for tie in problem.graph.ties]
    return sum(not members.isdisjoint(unit.members) for unit in problem.units for members in users) == 2


def _positions(tie: Tie, position: dict[str, int]) -> set[int]:
    return {position[group] for group in tie.groups}
