"""A placement problem, and the answer to one: values that every solver takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from planner.constraints import Constraints, Unit, units
from planner.graph import ModuleGraph
from planner.machine import Machine
from planner.memory import CostTable, MemoryBreakdown
from planner.polynomial import Quantities

Status = Literal["OPTIMAL", "FEASIBLE", "INFEASIBLE", "UNKNOWN"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Which groups may go where, and what each costs there.

    `home_bytes` are activations that the first device holds whatever is placed on it: inputs, results, and what is
    computed from them outside all modules.
    """

    graph: ModuleGraph
    machine: Machine
    quantities: Quantities
    table: CostTable
    units: tuple[Unit, ...]
    home_bytes: int = 0

    def base_bytes(self, position: int) -> int:
        """Activations on the device at this position before anything is placed on it."""
        return self.home_bytes if position == 0 else 0

    @classmethod
    def of(
        cls,
        graph: ModuleGraph,
        machine: Machine,
        quantities: Quantities,
        constraints: Constraints | None = None,
        home_bytes: int = 0,
    ) -> Problem:
        """The problem of placing `graph` on `machine` for the workload that `quantities` counts.

        Raises: ConstraintError as `planner.constraints.units` does.
        """
        return cls(
            graph=graph,
            machine=machine,
            quantities=quantities,
            table=CostTable.of(graph, quantities),
            units=units(graph, machine, constraints or Constraints()),
            home_bytes=home_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedStage:
    """A device, by position on the machine, and the groups on it, by position in the graph."""

    device: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """An answer with its proof: stages in execution order, the objective's value, and the best value possible.

    `extra_positions` is the objective of `balance`: KV positions per sequence beyond the workload's that every device
    still holds. An INFEASIBLE solution carries the nearest placement, in which some devices are too small.
    """

    status: Status
    stages: tuple[PlacedStage, ...]
    extra_positions: int
    bound: int
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a placement costs: peak memory per device, by position, and the KV positions that fit per sequence.

    `kv_positions` is None when no device holds any KV cache.
    """

    memory: tuple[MemoryBreakdown, ...]
    kv_positions: int | None


def evaluate(problem: Problem, stages: tuple[PlacedStage, ...]) -> Evaluation:
    """The one evaluator: scores any placement, whoever made it."""
    members: dict[int, list[int]] = {}
    for stage in stages:
        members.setdefault(stage.device, []).extend(stage.members)
    memory = tuple(
        problem.table.on_device(sorted(members.get(position, ())), device, problem.base_bytes(position))
        for position, device in enumerate(problem.machine.devices)
    )
    extra = [
        (device.memory_bytes - peak.total_bytes) // per_position
        for position, (device, peak) in enumerate(zip(problem.machine.devices, memory, strict=True))
        if (per_position := _kv_per_position(problem, members.get(position, ())))
    ]
    return Evaluation(memory=memory, kv_positions=problem.quantities.positions + min(extra) if extra else None)


def longest_cache(problem: Problem, stages: tuple[PlacedStage, ...]) -> int | None:
    """The longest KV cache, in positions per sequence, that these stages hold; None without any KV cache.

    Activations that grow with the cache count too, so this is at most `evaluate(...).kv_positions`.
    """
    low, high = problem.quantities.positions, evaluate(problem, stages).kv_positions
    if high is None:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        quantities = replace(problem.quantities, positions=middle)
        longer = replace(problem, quantities=quantities, table=CostTable.of(problem.graph, quantities))
        peaks = zip(problem.machine.devices, evaluate(longer, stages).memory, strict=True)
        fits = all(peak.total_bytes <= device.memory_bytes for device, peak in peaks)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _kv_per_position(problem: Problem, members: list[int] | tuple[()]) -> int:
    return sum(problem.table.loads[member].kv_bytes_per_position for member in members)
