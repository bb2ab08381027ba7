"""What beam search adds to a graph whose workload counts every beam as a sequence."""

from __future__ import annotations

from dataclasses import replace

from planner.graph import ModuleGraph, ModuleGroup
from planner.polynomial import Polynomial, constant, variable

SCORE_BYTES = 3 * 4
"""Per token of a beam's vocabulary: logits, their log-probabilities and the sums with the beam's own, in float32.

Source: `_beam_search` in transformers' generation/utils.py.
"""
REORDERING_LAUNCHES = 2
"""Keys and values of a layer are each picked anew after every step."""


def with_beams(graph: ModuleGraph, beam_bytes: int) -> ModuleGraph:
    """`graph` with the caches put in the order of the surviving beams at each step, and `beam_bytes` of scores a beam.

    A tensor of the cache is there twice while it is reordered, as it is when a token is appended to it, which the
    graph counts. Scores are made on the device of the inputs: that of the embedding where the graph names no home.
    """
    scores = variable("batch") * beam_bytes
    groups = [_reordering(group) for group in graph.groups]
    if graph.home is None:
        groups = [_with_scores(group, scores) if group.role == "embedding" else group for group in groups]
        return replace(graph, groups=tuple(groups))
    moments = tuple(moment + scores for moment in (graph.home.moments_bytes or (constant(0),)))
    return replace(graph, groups=tuple(groups), home=replace(graph.home, moments_bytes=moments))


def _reordering(group: ModuleGroup) -> ModuleGroup:
    if group.decode is None or not group.kv_bytes_per_position:
        return group
    cache = variable("batch") * variable("positions") * group.kv_bytes_per_position
    decode = replace(
        group.decode,
        read_bytes=group.decode.read_bytes + 2 * cache,
        launches=group.decode.launches + REORDERING_LAUNCHES,
    )
    return replace(group, decode=decode)


def _with_scores(group: ModuleGroup, scores: Polynomial) -> ModuleGroup:
    return replace(group, logits_bytes=group.logits_bytes + scores)
