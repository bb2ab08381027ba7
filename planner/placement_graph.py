"""A placement problem without a model: nodes with seconds and bytes, tensors between them, devices.

The objective is the slowest device's seconds: those of its nodes, and of the tensors that enter or leave it, each once
per device on both ends. A device is one stage: stages can be ordered so that no tensor goes back, hence each is convex.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What is placed as one. `seconds` are by device kind."""

    id: str
    memory_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A node's output and its readers, by position; `seconds` to get it off a device, and as many onto another."""

    name: str
    source: int
    readers: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphDevice:
    """A device by name, with the kind that decides how fast nodes run there."""

    name: str
    kind: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementGraph:
    """Nodes in an order in which they can run, and what binds them; all by position.

    `together` and `apart` are sets that share a device, or of which no two do; `pins` maps nodes to devices.
    """

    name: str
    nodes: tuple[Node, ...]
    tensors: tuple[Tensor, ...]
    devices: tuple[GraphDevice, ...]
    together: tuple[tuple[int, ...], ...] = ()
    apart: tuple[tuple[int, ...], ...] = ()
    pins: Mapping[int, int] | None = None

    def seconds_on(self, node: int, device: int) -> float:
        """Seconds of a node on a device."""
        return self.nodes[node].seconds[self.devices[device].kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLoad:
    """What a placement puts on one device."""

    memory_bytes: int = 0
    busy_s: float = 0.0
    incoming_s: float = 0.0
    outgoing_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds that the device needs for one pass."""
        return self.busy_s + self.incoming_s + self.outgoing_s


def device_loads(graph: PlacementGraph, placement: tuple[int, ...]) -> tuple[DeviceLoad, ...]:
    """The one evaluator: every device's load under any placement, given as device positions by node."""
    memory, busy = [0] * len(graph.devices), [0.0] * len(graph.devices)
    incoming, outgoing = [0.0] * len(graph.devices), [0.0] * len(graph.devices)
    for node, device in enumerate(placement):
        memory[device] += graph.nodes[node].memory_bytes
        busy[device] += graph.seconds_on(node, device)
    for tensor in graph.tensors:
        source = placement[tensor.source]
        targets = {placement[reader] for reader in tensor.readers} - {source}
        for target in targets:
            incoming[target] += tensor.seconds
        outgoing[source] += tensor.seconds if targets else 0.0
    return tuple(
        DeviceLoad(memory_bytes=memory[d], busy_s=busy[d], incoming_s=incoming[d], outgoing_s=outgoing[d])
        for d in range(len(graph.devices))
    )


def bottleneck_s(graph: PlacementGraph, placement: tuple[int, ...]) -> float:
    """Seconds of the slowest device."""
    return max(load.total_s for load in device_loads(graph, placement))
