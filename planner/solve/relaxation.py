"""A bound on the slowest device of a module graph: nodes may be divided among devices, and tensors cost nothing.

That leaves a linear programme, which takes a fraction of a second for a thousand nodes. Where devices differ it is far
above what a search of whole nodes knows at its start.
"""

from __future__ import annotations

from collections.abc import Sequence

from ortools.linear_solver import pywraplp

from planner.placement_graph import PlacementGraph

SLACK = 1e-7
"""The share by which the programme's value may be off: the solver's own tolerance."""


def least_slowest_s(graph: PlacementGraph, parts: Sequence[tuple[int, ...]], classes: Sequence[Sequence[int]]) -> float:
    """Seconds that some device needs in any placement of whole parts; 0 where not even divided ones fit.

    `classes` are devices, by position, that are interchangeable.
    """
    solver = pywraplp.Solver.CreateSolver("GLOP")
    slowest = solver.NumVar(_largest_part_s(graph, parts, classes), solver.infinity(), "slowest")
    share = [[solver.NumVar(0, 1, "") for _ in classes] for _ in parts]
    for row in share:
        solver.Add(sum(row) == 1)
    for kind, devices in enumerate(classes):
        chosen = list(zip((row[kind] for row in share), parts, strict=True))
        work = sum(one * _seconds(graph, part, devices[0]) for one, part in chosen)
        held = sum(one * sum(graph.nodes[node].memory_bytes for node in part) for one, part in chosen)
        solver.Add(work <= len(devices) * slowest)
        solver.Add(held <= float(len(devices) * graph.devices[devices[0]].memory_bytes))
    solver.Minimize(slowest)
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return 0.0
    return float(slowest.solution_value()) * (1 - SLACK)


def _largest_part_s(graph: PlacementGraph, parts: Sequence[tuple[int, ...]], classes: Sequence[Sequence[int]]) -> float:
    return max(min(_seconds(graph, part, devices[0]) for devices in classes) for part in parts)


def _seconds(graph: PlacementGraph, part: tuple[int, ...], device: int) -> float:
    return sum(graph.seconds_on(node, device) for node in part)
