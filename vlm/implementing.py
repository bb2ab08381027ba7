"""The graph of a workload as the implementation that it names runs it: habits sized by what a model's config says."""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ConstraintError
from planner.graph import ModuleGraph
from planner.implementation import IMPLEMENTATIONS, OURS, Sizes, as_implemented
from planner.workload import ITEMSIZE, Workload
from vlm.config_counts import vocab_size_of
from vlm.explaining import decoder_facts
from vlm.model import Model


def graph_as_run(model: Model, workload: Workload) -> ModuleGraph:
    """The module graph of a resolved workload under its implementation.

    Raises: ConstraintError for an implementation whose habits the config has no numbers for.
    """
    graph = model.graph(workload)
    if workload.implementation == OURS:
        return graph
    implementation, facts = IMPLEMENTATIONS[workload.implementation], decoder_facts(model.config)
    sizes = Sizes(
        vocab_size=vocab_size_of(model.config),
        head_dim=facts.head_dim if facts else 0,
        max_positions=model.max_positions or 0,
        itemsize=ITEMSIZE[workload.dtype],
    )
    needed = {
        "vocab_size": implementation.logits != "last" and not sizes.vocab_size,
        "a head's width and positions": implementation.rotary != "shared" and not sizes.head_dim * sizes.max_positions,
    }
    unknown = [name for name, is_missing in needed.items() if is_missing]
    if unknown:
        raise ConstraintError(
            f"--implementation {workload.implementation}: the config of {model.name} does not say {unknown[0]}, by "
            "which that is sized. Leave it out"
        )
    plain = graph.plain and as_implemented(graph.plain, implementation, sizes)
    return replace(as_implemented(graph, implementation, sizes), plain=plain)
