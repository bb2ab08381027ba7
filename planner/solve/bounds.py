"""Bounds that hold whatever the order of devices: as if there were as many of each class as anyone likes."""

from __future__ import annotations

import numpy as np

from planner.problem import NO_KV
from planner.solve.segments import Segments


def unlimited_bound(segments: Segments) -> int:
    """A value that no placement is better than, by the objective of the segments' problem."""
    objective = segments.problem.objective
    if objective == "latency":
        return _shortest_sum(segments)
    if objective == "throughput":
        return _least_worst(segments)
    return _most_extra(segments)


def _shortest_sum(segments: Segments) -> int:
    """Arithmetic alone, each run on the device that does it fastest."""
    best = [0] + [NO_KV] * segments.num_units
    for end in range(1, segments.num_units + 1):
        for runs in segments.by_class:
            for start in np.flatnonzero(runs.fits[:end, end]):
                best[end] = min(best[end], best[start] + int(runs.compute_ns[start, end]))
    return best[-1]


def _least_worst(segments: Segments) -> int:
    """The longer of two: the slowest stage, of arithmetic alone; and all arithmetic, spread over all devices evenly."""
    best = [0] + [NO_KV] * segments.num_units
    for end in range(1, segments.num_units + 1):
        for runs in segments.by_class:
            for start in np.flatnonzero(runs.fits[:end, end]):
                best[end] = min(best[end], max(best[start], int(runs.compute_ns[start, end])))
    per_unit = (min(int(runs.compute_ns[i, i + 1]) for runs in segments.by_class) for i in range(segments.num_units))
    return max(best[-1], -(-sum(per_unit) // len(segments.problem.machine.devices)))


def _most_extra(segments: Segments) -> int:
    """Every run as good as it is on the device that leaves it most room."""
    best = [NO_KV] + [0] * segments.num_units
    for end in range(1, segments.num_units + 1):
        for runs in segments.by_class:
            for start in np.flatnonzero(runs.fits[:end, end]):
                best[end] = max(best[end], min(best[start], int(runs.extra_positions[start, end])))
    return best[-1]
