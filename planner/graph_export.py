"""A module graph of ours as a module-graph file's content: additive costs that never promise more than ours do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import ConstraintError
from planner.graph import ModuleGraph
from planner.machine import Machine
from planner.memory import WORKSPACE_BYTES, CostTable
from planner.polynomial import Quantities
from planner.timing import NS_PER_S, FlowSize, TimeTable, link_between


def module_graph_content(
    graph: ModuleGraph, quantities: Quantities, machine: Machine, new_tokens: int, *, split_vision: bool = False
) -> dict[str, Any]:
    """`format: module-graph/1` for one request of the workload per pass.

    Memory adds up there and our activations do not: every device is made smaller by the largest peak that any placement
    may have on it. Links cost what the machine's slowest does.
    Raises: ConstraintError when the speed of a device is unknown.
    """
    table, times = CostTable.of(graph, quantities), TimeTable.of(graph, machine, quantities, new_tokens)
    unknown = [device.name for device, known in zip(machine.devices, times.groups, strict=True) if known is None]
    if unknown:
        raise ConstraintError(f"a module-graph file holds seconds, and the speed of {', '.join(unknown)} is unknown")
    kinds = [_kind(machine, position) for position in range(len(machine.devices))]
    everything = table.on_device(range(len(table.loads)), machine.devices[0])
    return {
        "format": "module-graph/1",
        "name": graph.name,
        "groups": [
            {
                "id": load.group.id,
                "memory_bytes": load.weights_bytes
                + load.kv_bytes_per_position * table.positions
                + load.buffers_bytes
                + load.logits_bytes,
                "seconds": {
                    kind: of_device[position].request_ns(new_tokens) / NS_PER_S
                    for kind, of_device in zip(kinds, times.groups, strict=True)
                    if of_device is not None
                },
            }
            for position, load in enumerate(table.loads)
        ],
        "edges": list(_edges(graph, times, machine)),
        "colocate": [list(fusion.operands) for fusion in graph.fusions if fusion.hard or not split_vision],
        "machine": {
            "devices": [
                {
                    "name": device.name,
                    "kind": kind,
                    "memory_bytes": max(
                        0,
                        device.memory_bytes
                        - device.context_bytes
                        - device.reserve_bytes
                        - WORKSPACE_BYTES
                        - everything.activations_bytes
                        - everything.buffers_bytes,
                    ),
                }
                for device, kind in zip(machine.devices, kinds, strict=True)
            ]
        },
    }


def _edges(graph: ModuleGraph, times: TimeTable, machine: Machine) -> list[dict[str, Any]]:
    """Flows between groups, one edge per reader; none leads back to a group that has run, as a file has no cycle."""
    position: Mapping[str, int] = {group.id: index for index, group in enumerate(graph)}
    found = []
    for flow, size in zip(graph.flows, times.flows, strict=True):
        seconds = _slowest_s(size, machine, times.new_tokens)
        found += [
            {"source": flow.producer, "target": reader, "tensor": f"{flow.phase}/{flow.tensor}", "seconds": seconds}
            for reader in flow.consumers
            if flow.producer in position and reader in position and position[flow.producer] < position[reader]
        ]
    return found


def _slowest_s(size: FlowSize, machine: Machine, new_tokens: int) -> float:
    positions = range(len(machine.devices))
    links = [link_between(machine, a, b) for a in positions for b in positions if a != b]
    return max((size.times(link).request_ns(new_tokens) for link in links if link.allowed), default=0) / NS_PER_S


def _kind(machine: Machine, position: int) -> str:
    """A name that devices of one speed share: the GPU model's, or the first such device's."""
    device = machine.devices[position]
    alike = (one for one in machine.devices if one.speed == device.speed)
    first = next(alike)
    return first.kind or first.name
