"""What a placement's devices peak at in each phase by itself, for comparison with a measurement of that phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from planner.graph import PHASES, ModuleGraph, ModuleGroup, Phase
from planner.memory import CostTable, MemoryBreakdown
from planner.problem import PlacedStage, Problem, evaluate

Watched = Literal["prompt", "decode"]
"""The vision pass and the prompt are one forward, and one measurement."""
PHASES_OF: Mapping[Watched, tuple[Phase, ...]] = {"prompt": ("encode", "prefill"), "decode": ("decode",)}


def peaks_by_phase(problem: Problem, stages: tuple[PlacedStage, ...]) -> Mapping[Watched, tuple[MemoryBreakdown, ...]]:
    """Peak bytes by part of every device of the machine: with the cache of the prompt, then of the whole answer."""
    counts = problem.quantities
    prompt = counts.text_tokens + counts.image_tokens
    found: dict[Watched, tuple[MemoryBreakdown, ...]] = {}
    for watched, phases in PHASES_OF.items():
        quantities = replace(counts, positions=prompt) if watched == "prompt" else counts
        graph = _in_phases(problem.graph, phases)
        alone = replace(problem, graph=graph, quantities=quantities, table=CostTable.of(graph, quantities))
        found[watched] = evaluate(alone, stages).memory
    return found


def _in_phases(graph: ModuleGraph, phases: tuple[Phase, ...]) -> ModuleGraph:
    """The graph of a model that is loaded, and has no other phases."""

    def kept(group: ModuleGroup) -> ModuleGroup:
        encode, prefill, decode = (group.cost(phase) if phase in phases else None for phase in PHASES)
        return replace(group, encode=encode, prefill=prefill, decode=decode, loading_bytes=0)

    return replace(
        graph,
        groups=tuple(map(kept, graph.groups)),
        flows=tuple(flow for flow in graph.flows if flow.phase in phases),
        intervals=tuple(interval for interval in graph.intervals if interval.phase in phases),
    )
