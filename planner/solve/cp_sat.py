"""The slowest stage of any module graph made as fast as possible, with a proof where time allows, by OR-Tools CP-SAT.

Stages are numbered as they run; a node is in one stage, and no edge leads back to an earlier one. Which class of device
a stage gets is decided too. The search starts from a good placement and has a fixed seed and number of workers; unless
a time limit is given it counts its effort deterministically, so that the same question gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
from ortools.sat.python import cp_model

from planner.errors import InfeasibleError
from planner.placement_graph import PlacementGraph, bottleneck_s, device_loads
from planner.problem import Status
from planner.solve.linear_order import best_cut
from planner.solve.relaxation import least_slowest_s
from planner.units import format_bytes

METHOD = "cp-sat"
RACED = "cp-sat, time limit: not reproducible"
NUM_WORKERS = 8
SEED = 1
EFFORT = 12.0
"""Deterministic time units after which the search stops: half a minute or so on one core."""
RESOLUTION = 10**7
"""Ticks in the seconds of all nodes on their slowest device: costs are rounded to these, downwards for the bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSolution:
    """A placement as device positions by node, its slowest device's seconds, and a bound on those of any placement."""

    status: Status
    placement: tuple[int, ...]
    value_s: float
    bound_s: float
    method: str

    @property
    def gap(self) -> float:
        """How much faster another placement might be, as a share."""
        return (self.value_s - self.bound_s) / self.value_s if self.value_s else 0.0


def solve(graph: PlacementGraph, time_limit_s: float | None = None) -> GraphSolution:
    """The best placement found, OPTIMAL where it is proven to be within the costs' resolution of the best.

    Raises: InfeasibleError when no placement keeps all constraints and fits.
    """
    parts = _parts(graph)
    classes = _device_classes(graph)
    least_s = least_slowest_s(graph, parts, classes)
    model = _Model(graph, parts, classes, least_s)
    hint = best_cut(graph, parts)
    if hint is not None and _is_legal(graph, hint):
        model.start_from(hint)
    solver = cp_model.CpSolver()
    _set_limits(solver, time_limit_s)
    outcome = solver.solve(model.model)
    method = METHOD if time_limit_s is None else RACED
    if outcome not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        if outcome == cp_model.INFEASIBLE or hint is None or not _is_legal(graph, hint):
            raise _refusal(graph, proven=outcome == cp_model.INFEASIBLE)
        placement = hint
    else:
        placement = model.placement(solver)
    value = bottleneck_s(graph, placement)
    bound = min(value, max(least_s, solver.best_objective_bound * model.tick_s))
    proven = outcome == cp_model.OPTIMAL
    return GraphSolution(
        status="OPTIMAL" if proven else "FEASIBLE",
        placement=placement,
        value_s=value,
        bound_s=value if proven else bound,
        method=method,
    )


def _set_limits(solver: cp_model.CpSolver, time_limit_s: float | None) -> None:
    """Workers that take turns give one answer always; workers that race prove more in the same time."""
    solver.parameters.num_workers = NUM_WORKERS
    solver.parameters.random_seed = SEED
    if time_limit_s is None:
        solver.parameters.interleave_search = True
        solver.parameters.max_deterministic_time = EFFORT
    else:
        solver.parameters.max_time_in_seconds = time_limit_s


def _parts(graph: PlacementGraph) -> list[tuple[int, ...]]:
    """Nodes that must share a stage: held together, or on a cycle that holding together makes."""
    network: nx.DiGraph[int] = nx.DiGraph()
    network.add_nodes_from(range(len(graph.nodes)))
    network.add_edges_from((tensor.source, reader) for tensor in graph.tensors for reader in tensor.readers)
    for names in graph.together:
        network.add_edges_from([*zip(names, names[1:], strict=False), *zip(names[1:], names, strict=False)])
    return sorted(tuple(sorted(part)) for part in nx.strongly_connected_components(network))


class _Model:
    """The variables: `inside[part][stage]`, and `gets[stage][class]`."""

    def __init__(
        self,
        graph: PlacementGraph,
        parts: Sequence[tuple[int, ...]],
        classes: Sequence[Sequence[int]],
        least_s: float,
    ) -> None:
        self._graph = graph
        self._parts = parts
        self._classes = classes
        self._least_s = least_s
        self._part_of = {node: index for index, part in enumerate(parts) for node in part}
        self._stages = range(len(graph.devices))
        self.model = cp_model.CpModel()
        longest = sum(max(node.seconds.values()) for node in graph.nodes) + 2 * sum(t.seconds for t in graph.tensors)
        self.tick_s = longest / RESOLUTION if longest else 1.0
        self._inside = [[self.model.new_bool_var(f"p{p}s{s}") for s in self._stages] for p in range(len(parts))]
        self._gets = [[self.model.new_bool_var(f"s{s}c{c}") for c in range(len(self._classes))] for s in self._stages]
        self._assign()
        self._keep_order()
        self._keep_constraints()
        self._bound_loads()

    def start_from(self, placement: tuple[int, ...]) -> None:
        """Begin the search at this placement."""
        order = self._stage_order(placement)
        stage_of = {device: stage for stage, device in enumerate(order)}
        for stage, device in enumerate(order):
            for gets, devices in zip(self._gets[stage], self._classes, strict=True):
                self.model.add_hint(gets, int(device in devices))
        for inside, part in zip(self._inside, self._parts, strict=True):
            for stage in self._stages:
                self.model.add_hint(inside[stage], int(stage == stage_of[placement[part[0]]]))

    def placement(self, solver: cp_model.CpSolver) -> tuple[int, ...]:
        """The devices that a solution gives, by node: within a class, in the order of stages."""
        waiting = [list(devices) for devices in self._classes]
        device_of = []
        for gets in self._gets:
            kind = next(c for c, chosen in enumerate(gets) if solver.boolean_value(chosen))
            device_of.append(waiting[kind].pop(0))
        stage_of = [next(s for s in self._stages if solver.boolean_value(inside[s])) for inside in self._inside]
        return tuple(device_of[stage_of[self._part_of[node]]] for node in range(len(self._graph.nodes)))

    def _stage_order(self, placement: tuple[int, ...]) -> list[int]:
        """The devices in an order in which no edge leads back, those without nodes last."""
        network: nx.DiGraph[int] = nx.DiGraph()
        network.add_nodes_from(placement)
        pairs = ((placement[t.source], placement[reader]) for t in self._graph.tensors for reader in t.readers)
        network.add_edges_from((source, target) for source, target in pairs if source != target)
        used = list(nx.lexicographical_topological_sort(network))
        return [*used, *(device for device in range(len(self._graph.devices)) if device not in used)]

    def _assign(self) -> None:
        for inside in self._inside:
            self.model.add_exactly_one(inside)
        for gets in self._gets:
            self.model.add_exactly_one(gets)
        for kind, devices in enumerate(self._classes):
            self.model.add(sum(gets[kind] for gets in self._gets) == len(devices))

    def _keep_order(self) -> None:
        """A reader is in no earlier stage: where it is by some stage, so is its source."""
        by_stage = [self._prefixes(part) for part in range(len(self._parts))]
        edges = {(self._part_of[t.source], self._part_of[r]) for t in self._graph.tensors for r in t.readers}
        for source, target in sorted(edges):
            if source != target:
                for stage in self._stages:
                    self.model.add_implication(by_stage[target][stage], by_stage[source][stage])

    def _prefixes(self, part: int) -> list[cp_model.IntVar]:
        """By stage, whether the part is in it or an earlier one."""
        found = [self._inside[part][0]]
        for stage in self._stages[1:]:
            until = self.model.new_bool_var(f"p{part}u{stage}")
            self.model.add(until == found[-1] + self._inside[part][stage])
            found.append(until)
        return found

    def _keep_constraints(self) -> None:
        for names in self._graph.apart:
            for stage in self._stages:
                self.model.add_at_most_one(self._inside[part][stage] for part in {self._part_of[n] for n in names})
        for node, device in (self._graph.pins or {}).items():
            kind = next(c for c, devices in enumerate(self._classes) if device in devices)
            for stage in self._stages:
                self.model.add_implication(self._inside[self._part_of[node]][stage], self._gets[stage][kind])

    def _bound_loads(self) -> None:
        """The objective: the most ticks on any device; and each device's memory."""
        graph = self._graph
        rounding = len(self._parts) + 2 * len(graph.tensors)  # every cost is rounded down
        least = max(0, int(self._least_s / self.tick_s) - rounding)
        slowest = self.model.new_int_var(least, 2 * RESOLUTION, "slowest")
        transfers = [self._transfer_terms(stage) for stage in self._stages]
        for kind, devices in enumerate(self._classes):
            device = devices[0]
            ticks = [int(sum(graph.seconds_on(n, device) for n in part) / self.tick_s) for part in self._parts]
            sizes = [sum(graph.nodes[n].memory_bytes for n in part) for part in self._parts]
            for stage in self._stages:
                inside = [self._inside[part][stage] for part in range(len(self._parts))]
                crossings, prices = transfers[stage]
                used = cp_model.LinearExpr.weighted_sum([*inside, *crossings], [*ticks, *prices])
                held = cp_model.LinearExpr.weighted_sum(inside, sizes)
                constraints = [self.model.add(used <= slowest)]
                constraints += [self.model.add(held <= graph.devices[device].memory_bytes)]
                if len(self._classes) > 1:
                    for constraint in constraints:
                        constraint.only_enforce_if(self._gets[stage][kind])
        self.model.minimize(slowest)

    def _transfer_terms(self, stage: int) -> tuple[list[cp_model.IntVar], list[int]]:
        """Whether each tensor enters and leaves a stage, and the ticks that it takes each way."""
        crossings: list[cp_model.IntVar] = []
        prices: list[int] = []
        for index, tensor in enumerate(self._graph.tensors):
            ticks = int(tensor.seconds / self.tick_s)
            readers = {self._part_of[reader] for reader in tensor.readers} - {self._part_of[tensor.source]}
            if not readers or not ticks:
                continue
            here = self._inside[self._part_of[tensor.source]][stage]
            comes, goes = (self.model.new_bool_var(f"t{index}{way}{stage}") for way in ("in", "out"))
            for reader in sorted(readers):
                read_here = self._inside[reader][stage]
                self.model.add_bool_or([comes, here, ~read_here])
                self.model.add_bool_or([goes, ~here, read_here])
            crossings += [comes, goes]
            prices += [ticks, ticks]
        return crossings, prices


def _device_classes(graph: PlacementGraph) -> list[list[int]]:
    """Devices that are interchangeable: of one kind and size, and named by no pin."""
    pinned = set((graph.pins or {}).values())
    found: dict[object, list[int]] = {}
    for index, device in enumerate(graph.devices):
        found.setdefault((index if index in pinned else None, device.kind, device.memory_bytes), []).append(index)
    return list(found.values())


def _is_legal(graph: PlacementGraph, placement: tuple[int, ...]) -> bool:
    fits = all(
        load.memory_bytes <= device.memory_bytes
        for load, device in zip(device_loads(graph, placement), graph.devices, strict=True)
    )
    pinned = all(placement[node] == device for node, device in (graph.pins or {}).items())
    return fits and pinned and all(len({placement[n] for n in names}) == len(set(names)) for names in graph.apart)


def _refusal(graph: PlacementGraph, *, proven: bool) -> InfeasibleError:
    needed, there = sum(n.memory_bytes for n in graph.nodes), sum(d.memory_bytes for d in graph.devices)
    largest = max(graph.nodes, key=lambda node: node.memory_bytes)
    said = "no placement fits" if proven else "no placement was found in the time given"
    return InfeasibleError(
        f"{graph.name}: {said}: the nodes take {format_bytes(needed)}, the {len(graph.devices)} devices hold "
        f"{format_bytes(there)}; the largest node, {largest.id!r}, takes {format_bytes(largest.memory_bytes)}. "
        "Add memory, or lift a pin, a separation or a co-location.",
        shortfall_bytes={"all devices": max(0, needed - there)},
    )
