"""What packing weights takes while they are loaded: they arrive whole, and are turned into codes on their device."""

from __future__ import annotations

from dataclasses import replace

from planner.graph import Linear, ModuleGraph
from planner.quantisation import FLOAT16, FLOAT32, LAYOUTS, FourBit, Layout, groups_of
from planner.workload import ITEMSIZE


def packed_while_loaded(graph: ModuleGraph) -> ModuleGraph:
    """`graph`, some of whose weights are held in fewer bits, with the room that it takes to make them so.

    Weights are packed one after the other, so a device needs that of its largest.
    """
    layouts = {name: LAYOUTS[layout] for name, layout in graph.held}
    itemsize = ITEMSIZE[graph.dtype]
    groups = []
    for group in graph:
        packed = (packing_bytes(layouts[one.name], one, itemsize) for one in group.linears if one.name in layouts)
        groups.append(replace(group, loading_bytes=max(packed, default=0)))
    return replace(graph, groups=tuple(groups))


def packing_bytes(layout: Layout, linear: Linear, itemsize: int) -> int:
    """Bytes that are there for a moment, beside those that stay, while a weight is packed on its device.

    It arrives in the model's dtype. For int8 it then goes to the host and comes again in float16, the first copy still
    there; scales that are quantised again are there in float32, with and without their mean.
    Source: transformers 5.23, integrations/bitsandbytes.py; bitsandbytes 0.50, nn/modules.py and functional.py.
    """
    if not isinstance(layout, FourBit):
        return linear.num_weights * (itemsize + FLOAT16)
    scales = 2 * groups_of(linear.num_weights, layout.BLOCK) * FLOAT32 if layout.double else 0
    return linear.num_weights * itemsize + scales
