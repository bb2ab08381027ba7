"""A model's graph as its weights are held: as the workload asks, or as the checkpoint stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.errors import ConstraintError, SourceError, UnsupportedModelError
from planner.graph import ModuleGraph
from planner.implementation import FLOAT32, IMPLEMENTATIONS
from planner.packing import packed_while_loaded
from planner.quantisation import LAYOUTS, FourBit, Layout, chosen_linears, held_in
from planner.workload import Workload
from vlm.checkpoint import Checkpoint
from vlm.stored_layouts import quantization_config, stored_layouts


def held_graph(
    graph: ModuleGraph, workload: Workload, config: Mapping[str, Any], checkpoint: Checkpoint | None
) -> ModuleGraph:
    """`graph`, whose weights are plain, with those in fewer bits that are to be, or already are.

    "auto" leaves them plain: what fits depends on a machine, and is decided before.
    Raises: ConstraintError for a quantised checkpoint that is to be quantised; UnsupportedModelError where the model
    has no layers for it, or the checkpoint's method is unknown; SourceError where its headers contradict the config.
    """
    if checkpoint is not None and quantization_config(config) is None:
        refuse_other_shapes(graph, checkpoint)
    held = held_in(graph, layouts_for(graph, workload, config, checkpoint), workload.num_sequences)
    return held if workload.quantize not in LAYOUTS else packed_while_loaded(held)


def refuse_other_shapes(graph: ModuleGraph, checkpoint: Checkpoint) -> None:
    """Raise SourceError when a linear layer's weight is stored under its own name in another shape."""
    for linear in (linear for group in graph for linear in group.linears):
        header = checkpoint.tensors.get(f"{linear.name}.weight")
        if header is not None and header.shape != (linear.rows, linear.cols):
            raise SourceError(
                f"{header.shard}: {linear.name}.weight is {list(header.shape)}, the config says "
                f"{[linear.rows, linear.cols]}. Download config and weights from the same revision"
            )


def layouts_for(
    graph: ModuleGraph, workload: Workload, config: Mapping[str, Any], checkpoint: Checkpoint | None
) -> Mapping[str, Layout]:
    """The layouts of a plain graph's linear layers by name, of those in fewer bits; raises as `held_graph`."""
    stored = quantization_config(config)
    if stored is not None:
        refuse_twice(graph.name, stored, workload)
        return stored_layouts(graph, stored, checkpoint.tensors if checkpoint else {}, graph.name)
    if workload.quantize not in LAYOUTS:
        return {}
    chosen = list(chosen_linears(graph, vision=workload.quantize_vision))
    if not chosen:
        raise UnsupportedModelError(
            f"{graph.name} has no linear layers that can be held in {workload.quantize}: its costs name none"
        )
    layout: Layout = LAYOUTS[workload.quantize]
    if IMPLEMENTATIONS[workload.implementation].products == "float32" and isinstance(layout, FourBit):
        layout = replace(layout, product_itemsize=FLOAT32)
    return {linear.name: layout for linear in chosen}


def refuse_twice(name: str, stored: Mapping[str, Any], workload: Workload) -> None:
    """Raise ConstraintError when a workload asks a quantised checkpoint to be quantised."""
    if workload.quantize not in ("none", "auto"):
        raise ConstraintError(
            f"--quantize {workload.quantize}: {name} is quantised already ({stored.get('quant_method')}). Leave the "
            "option out, or take the checkpoint in 16 bits."
        )
