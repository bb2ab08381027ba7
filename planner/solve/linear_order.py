"""A good placement of a module graph fast: the best way to cut one of a few linear orders into stages.

On graphs of inference passes this is within a percent or so of the best contiguous placement, and it is what a search
that proves something starts from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from planner.placement_graph import PlacementGraph, Tensor

Seconds = NDArray[np.float64]


def best_cut(graph: PlacementGraph, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The best placement found, as device positions by node; None when no order can be cut to fit.

    `parts` are nodes that share a device, in an order in which they can run; pins and separations are checked after.
    """
    part_of = {node: part for part, nodes in enumerate(parts) for node in nodes}
    network: nx.DiGraph[int] = nx.DiGraph()
    network.add_nodes_from(range(len(parts)))
    for tensor in graph.tensors:
        source = part_of[tensor.source]
        network.add_edges_from((source, part_of[r]) for r in tensor.readers if part_of[r] != source)
    found: list[tuple[float, tuple[int, ...]]] = []
    for order in _orders(network):
        for cost, cut in _cuts(graph, [parts[part] for part in order]):
            found.append((cost, cut))
    return min(found)[1] if found else None


def _orders(network: nx.DiGraph[int]) -> Iterator[list[int]]:
    """As listed, breadth first, and depth first from either end."""
    yield list(nx.lexicographical_topological_sort(network))
    yield list(nx.topological_sort(network))
    yield list(reversed(list(nx.dfs_postorder_nodes(network))))
    backwards = network.reverse(copy=False)
    yield list(nx.dfs_postorder_nodes(backwards))


def _cuts(graph: PlacementGraph, order: Sequence[tuple[int, ...]]) -> Iterator[tuple[float, tuple[int, ...]]]:
    """The best cut of one order into a run per device, devices in any order; equal ones are only counted."""
    classes: dict[tuple[str, int], list[int]] = {}
    for index, device in enumerate(graph.devices):
        classes.setdefault((device.kind, device.memory_bytes), []).append(index)
    members = list(classes.values())
    costs = [_run_seconds(graph, order, devices[0]) for devices in members]
    best: dict[tuple[int, ...], Seconds] = {(0,) * len(members): np.array([0.0] + [np.inf] * len(order))}
    came: dict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    for counts in product(*(range(len(devices) + 1) for devices in members)):
        if not any(counts):
            continue
        value, start, kind = _best_last_run(counts, best, costs)
        best[counts], came[counts] = value, (start, kind)
    counts = min(best, key=lambda key: (best[key][-1], sum(key)))
    if np.isfinite(best[counts][-1]):
        yield float(best[counts][-1]), _placement(counts, came, members, order)


def _best_last_run(
    counts: tuple[int, ...], best: dict[tuple[int, ...], Seconds], costs: Sequence[Seconds]
) -> tuple[Seconds, NDArray[np.int64], NDArray[np.int64]]:
    """By end, the least slowest stage with these devices; where the last one starts, and its class."""
    options = [(kind, (*counts[:kind], n - 1, *counts[kind + 1 :])) for kind, n in enumerate(counts) if n]
    value = np.full(len(costs[0]), np.inf)
    start = np.zeros(len(costs[0]), dtype=np.int64)
    chosen = np.zeros(len(costs[0]), dtype=np.int64)
    for kind, rest in options:
        slowest = np.maximum(best[rest][:, None], costs[kind])
        here = slowest.min(axis=0)
        better = here < value
        value, start = np.where(better, here, value), np.where(better, slowest.argmin(axis=0), start)
        chosen = np.where(better, kind, chosen)
    return value, start, chosen


def _placement(
    counts: tuple[int, ...],
    came: dict[tuple[int, ...], tuple[NDArray[np.int64], NDArray[np.int64]]],
    members: Sequence[list[int]],
    order: Sequence[tuple[int, ...]],
) -> tuple[int, ...]:
    where: dict[int, int] = {}
    end = len(order)
    while end:
        starts, kinds = came[counts]
        start, kind = int(starts[end]), int(kinds[end])
        device = members[kind][counts[kind] - 1]
        where |= {node: device for part in order[start:end] for node in part}
        counts = (*counts[:kind], counts[kind] - 1, *counts[kind + 1 :])
        end = start
    return tuple(where[node] for node in range(len(where)))


def _run_seconds(graph: PlacementGraph, order: Sequence[tuple[int, ...]], device: int) -> Seconds:
    """Shape (start, end): seconds of a run with its transfers on a device; infinite where it does not fit."""
    count = len(order)
    place = {node: index for index, part in enumerate(order) for node in part}
    seconds = np.cumsum([0.0] + [sum(graph.seconds_on(node, device) for node in part) for part in order])
    memory = np.cumsum([0] + [sum(graph.nodes[node].memory_bytes for node in part) for part in order])
    # Rectangles of runs that a tensor enters or leaves, as differences that two running sums turn into areas.
    steps = np.zeros((count + 2, count + 2))
    for tensor in graph.tensors:
        for low_start, high_start, low_end, high_end in _crossing_runs(tensor, place, count):
            steps[low_start, low_end] += tensor.seconds
            steps[high_start, low_end] -= tensor.seconds
            steps[low_start, high_end] -= tensor.seconds
            steps[high_start, high_end] += tensor.seconds
    crossing = steps.cumsum(axis=0).cumsum(axis=1)[: count + 1, : count + 1]
    total = seconds[None, :] - seconds[:, None] + crossing
    starts, ends = np.ogrid[: count + 1, : count + 1]
    fits = (ends > starts) & (memory[None, :] - memory[:, None] <= graph.devices[device].memory_bytes)
    return np.where(fits, total, np.inf)


def _crossing_runs(tensor: Tensor, place: dict[int, int], count: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges of starts and of ends, the upper ones excluded, between which a run sends or gets the tensor."""
    source = place[tensor.source]
    readers = sorted({place[reader] for reader in tensor.readers} - {source})
    if not readers:
        return
    yield 0, source + 1, source + 1, readers[-1] + 1
    before = source
    for reader in readers:
        yield before + 1, reader + 1, reader + 1, count + 1
        before = reader
