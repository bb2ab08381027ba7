"""Module-graph files, `format: module-graph/1` in JSON or YAML: any tool's placement problem, without torch.

Everything that is wrong with a file is said at once, worst first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import networkx as nx

from planner.errors import SourceError
from planner.machine import gpu_presets
from planner.placement_graph import GraphDevice, Node, PlacementGraph, Tensor
from planner.textfile import read_mapping
from planner.timing import FLOPS_FRACTION, PCIE_BYTES_PER_S

FORMAT = "module-graph/1"
MAX_NODES = 5000
MAX_BYTES = 10**15
"""Of a group or a device: a petabyte."""
MAX_SHOWN = 12
_TOP_KEYS = {"format", "name", "groups", "edges", "colocate", "separate", "pins", "machine"}


def read_module_graph(path: Path) -> PlacementGraph:
    """The problem in a file.

    Raises: SourceError listing every problem found, worst first.
    """
    return module_graph_from(read_mapping(path, "module graph", SourceError), str(path))


def module_graph_from(content: Mapping[str, Any], where: str) -> PlacementGraph:
    """The problem that plain data describe; raises as `read_module_graph`."""
    if content.get("format") != FORMAT:
        raise SourceError(f"{where} has format {content.get('format')!r}: this version reads {FORMAT}")
    reader = _Reader(content)
    graph = reader.graph(Path(where).stem)
    if reader.problems:
        raise SourceError(_complaint(where, reader.problems))
    return graph


def _complaint(where: str, problems: list[tuple[int, str]]) -> str:
    texts = list(dict.fromkeys(text for _, text in sorted(problems, key=lambda problem: problem[0])))
    shown = [f"  {text}" for text in texts[:MAX_SHOWN]]
    more = [f"  and {len(texts) - MAX_SHOWN} more"] if len(texts) > MAX_SHOWN else []
    count = f"{len(texts)} problem{'s'[: len(texts) != 1]}"
    return "\n".join([f"{where} is no placement problem that can be solved: {count}.", *shown, *more])


UNREADABLE, COSTS, NAMES, CYCLES, CONTRADICTIONS = range(5)
"""How bad a problem is, the worst first."""


@dataclass(slots=True)
class _Reader:
    """Reads part by part, noting what is wrong and going on."""

    content: Mapping[str, Any]
    problems: list[tuple[int, str]] = field(default_factory=list)

    def graph(self, stem: str) -> PlacementGraph:
        self._note(UNREADABLE, (f"unknown key {key!r} at the top" for key in sorted(set(self.content) - _TOP_KEYS)))
        devices = list(self._devices())
        nodes = list(self._nodes({device.kind: device for device in devices}))
        if not nodes:
            self._note(UNREADABLE, ["groups is empty: give at least one group with id, memory_bytes and seconds"])
        position = {node.id: index for index, node in enumerate(nodes)}
        order = self._order(nodes, position)
        place = {node.id: rank for rank, node in enumerate(order)}
        graph = PlacementGraph(
            name=str(self.content.get("name", stem)),
            nodes=tuple(order),
            tensors=tuple(self._tensors(place)),
            devices=tuple(devices),
            together=tuple(self._sets("colocate", place)),
            apart=tuple(self._sets("separate", place)),
            pins=self._pins(place, {device.name: index for index, device in enumerate(devices)}),
        )
        self._check_contradictions(graph)
        return graph

    def _note(self, severity: int, texts: Iterable[str]) -> None:
        self.problems += [(severity, text) for text in texts]

    def _entries(self, name: str, content: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        found = (self.content if content is None else content).get(name, [])
        if not isinstance(found, list) or len(found) > 20 * MAX_NODES:
            self._note(UNREADABLE, [f"{name} is {type(found).__name__}, not a list of mappings of sane length"])
            return
        for index, entry in enumerate(found):
            if isinstance(entry, Mapping):
                yield f"{name}[{index}]", entry
            else:
                self._note(UNREADABLE, [f"{name}[{index}] is {entry!r}, not a mapping"])

    def _devices(self) -> Iterator[GraphDevice]:
        machine = self.content.get("machine")
        if not isinstance(machine, Mapping):
            self._note(UNREADABLE, ["machine is missing: give machine.devices with name, kind and memory_bytes"])
            return
        seen: set[str] = set()
        for where, entry in self._entries("devices", machine):
            name, kind = str(entry.get("name", "")), str(entry.get("kind", "device"))
            if not name:
                self._note(UNREADABLE, [f"machine.{where} has no name"])
            elif name in seen:
                self._note(NAMES, [f"device {name!r} is named twice"])
            seen.add(name)
            memory = self._bytes(entry.get("memory_bytes"), f"machine.{where}.memory_bytes")
            yield GraphDevice(name=name, kind=kind, memory_bytes=memory)
        if not seen:
            self._note(UNREADABLE, ["machine.devices is empty: give at least one device"])

    def _nodes(self, kinds: Mapping[str, GraphDevice]) -> Iterator[Node]:
        seen: set[str] = set()
        for where, entry in self._entries("groups"):
            name = str(entry.get("id", ""))
            if not name or name in seen:
                self._note(NAMES, [f"group {name!r} is given twice" if name else f"{where} has no id"])
                continue
            if len(seen) == MAX_NODES:
                self._note(UNREADABLE, [f"more than {MAX_NODES} groups: merge some"])
                return
            seen.add(name)
            memory = self._bytes(entry.get("memory_bytes"), f"group {name!r}: memory_bytes")
            yield Node(id=name, memory_bytes=memory, seconds=self._seconds(entry, kinds, f"group {name!r}"))

    def _seconds(self, entry: Mapping[str, Any], kinds: Iterable[str], where: str) -> dict[str, float]:
        """By kind: `seconds` as a number or by kind, or `flops` on kinds that are known GPU models."""
        given = entry.get("seconds")
        if given is None and "flops" in entry:
            flops = entry["flops"]
            return {kind: self._flops_seconds(flops, kind, where) for kind in kinds}
        if isinstance(given, Mapping):
            return {kind: self._number(given.get(kind), f"{where}: seconds on {kind!r}") for kind in kinds}
        return dict.fromkeys(kinds, self._number(given, f"{where}: seconds"))

    def _flops_seconds(self, flops: Any, kind: str, where: str) -> float:
        number = self._number(flops.get(kind) if isinstance(flops, Mapping) else flops, f"{where}: flops")
        preset = gpu_presets().get(kind)
        if preset is None:
            self._note(COSTS, [f"{where}: flops on {kind!r}, whose rate is unknown: give seconds, or name a GPU model"])
            return 0.0
        return number / (float(preset["flops"]) * float(preset.get("flops_fraction", FLOPS_FRACTION)))

    def _number(self, value: Any, what: str) -> float:
        """A cost of zero or more; YAML reads `1e-3` as text, JSON does not."""
        if value is None:
            self._note(COSTS, [f"{what} is missing"])
            return 0.0
        try:
            number = float(value) if not isinstance(value, bool) else float("nan")
        except (TypeError, ValueError):
            number = float("nan")
        if not isfinite(number) or number < 0:
            self._note(COSTS, [f"{what} is {value!r}: a cost is a number of zero or more"])
            return 0.0
        return number

    def _bytes(self, value: Any, what: str) -> int:
        """A whole number of bytes that sums of thousands of which can be counted with."""
        number = self._number(value, what)
        if number != int(number) or number > MAX_BYTES:
            self._note(COSTS, [f"{what} is {value!r}: bytes are a whole number of at most {MAX_BYTES:.0e}"])
            return 0
        return int(number)

    def _ends(self, place: Mapping[str, int]) -> Iterator[tuple[str, Mapping[str, Any], int, int]]:
        for where, entry in self._entries("edges"):
            ends = [str(entry.get(end, "")) for end in ("source", "target")]
            self._note(NAMES, (f"{where} names the unknown group {end!r}" for end in ends if end not in place))
            if all(end in place for end in ends):
                yield where, entry, place[ends[0]], place[ends[1]]

    def _tensors(self, place: Mapping[str, int]) -> Iterator[Tensor]:
        """Edges of equal source and tensor are one tensor, which must cost the same on each."""
        bandwidth = self._bandwidth()
        found: dict[tuple[int, str], tuple[list[int], float]] = {}
        for where, entry, source, target in self._ends(place):
            name = str(entry.get("tensor", f"{source}->{target}"))
            if "seconds" in entry:
                seconds = self._number(entry["seconds"], f"{where}.seconds")
            else:
                seconds = self._number(entry.get("bytes"), f"{where}.bytes") / bandwidth
            readers, known = found.setdefault((source, name), ([], seconds))
            if seconds != known:
                self._note(COSTS, [f"{where} costs {seconds} s, another edge of the same tensor {name!r} {known} s"])
            readers.append(target)
        for (source, name), (readers, seconds) in found.items():
            yield Tensor(name=name, source=source, readers=tuple(dict.fromkeys(readers)), seconds=seconds)

    def _bandwidth(self) -> float:
        machine = self.content.get("machine")
        given = machine.get("bandwidth_bytes_per_s") if isinstance(machine, Mapping) else None
        if given is None:
            return PCIE_BYTES_PER_S
        bandwidth = self._number(given, "machine.bandwidth_bytes_per_s")
        if not bandwidth:
            self._note(
                COSTS, ["machine.bandwidth_bytes_per_s has to be above zero: leave it out where it is not known"]
            )
        return bandwidth or PCIE_BYTES_PER_S

    def _order(self, nodes: list[Node], position: Mapping[str, int]) -> list[Node]:
        """The nodes in an order in which they can run, as near to the file's as that allows."""
        network: nx.DiGraph[int] = nx.DiGraph()
        network.add_nodes_from(range(len(nodes)))
        edges = self.content.get("edges", [])
        for entry in edges if isinstance(edges, list) else []:
            ends = [str(entry.get(end, "")) for end in ("source", "target")] if isinstance(entry, Mapping) else [""]
            if all(end in position for end in ends):
                network.add_edge(position[ends[0]], position[ends[1]])
        if not nx.is_directed_acyclic_graph(network):
            cycle = [nodes[source].id for source, *_ in nx.find_cycle(network)]
            self._note(CYCLES, [f"the edges form a cycle: {' -> '.join([*cycle[:8], cycle[0]])}"])
            return nodes
        return [nodes[index] for index in nx.lexicographical_topological_sort(network)]

    def _sets(self, name: str, place: Mapping[str, int]) -> Iterator[tuple[int, ...]]:
        found = self.content.get(name) or []
        if not isinstance(found, list) or not all(isinstance(names, list) for names in found):
            self._note(UNREADABLE, [f"{name} is {found!r}: give a list of lists of group ids"])
            return
        for names in found:
            unknown = [str(one) for one in names if str(one) not in place]
            self._note(NAMES, (f"{name} names the unknown group {one!r}" for one in unknown))
            yield tuple(place[str(one)] for one in names if str(one) in place)

    def _pins(self, place: Mapping[str, int], devices: Mapping[str, int]) -> dict[int, int]:
        given = self.content.get("pins") or {}
        if not isinstance(given, Mapping):
            self._note(UNREADABLE, [f"pins is {given!r}: give a mapping of group to device"])
            return {}
        for node, device in given.items():
            if str(node) not in place:
                self._note(NAMES, [f"pins names the unknown group {node!r}"])
            if str(device) not in devices:
                self._note(NAMES, [f"pins names the unknown device {device!r}"])
        pairs = ((str(node), str(device)) for node, device in given.items())
        return {place[node]: devices[device] for node, device in pairs if node in place and device in devices}

    def _check_contradictions(self, graph: PlacementGraph) -> None:
        merged: nx.Graph[int] = nx.Graph()
        merged.add_nodes_from(range(len(graph.nodes)))
        for names in graph.together:
            nx.add_path(merged, names)
        part_of = {node: part for part, nodes in enumerate(nx.connected_components(merged)) for node in nodes}
        pinned: dict[int, tuple[int, int]] = {}
        for node, device in (graph.pins or {}).items():
            other, elsewhere = pinned.setdefault(part_of[node], (node, device))
            if elsewhere != device:
                both = f"{graph.nodes[other].id!r} and {graph.nodes[node].id!r}"
                self._note(CONTRADICTIONS, [f"colocate holds {both} together, pins put them on different devices"])
        for names in graph.apart:
            seen: dict[int, int] = {}
            for node in names:
                other = seen.setdefault(part_of[node], node)
                if other != node or names.count(node) > 1:
                    pair = f"{graph.nodes[other].id!r} and {graph.nodes[node].id!r}"
                    self._note(CONTRADICTIONS, [f"separate keeps {pair} apart, colocate holds them together"])
                elif (graph.pins or {}).get(node, -1) in [(graph.pins or {}).get(n) for n in names if n != node]:
                    self._note(CONTRADICTIONS, [f"separate keeps {graph.nodes[node].id!r} apart from one on its pin"])
            if len(set(names)) > len(graph.devices):
                self._note(CONTRADICTIONS, [f"separate lists {len(names)} groups for {len(graph.devices)} devices"])
