"""What the other ways to place a model would give: fewest GPUs, lowest latency, balance, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from planner.plan import Estimate
from planner.problem import TIMED, Objective, Problem, evaluate, longest_cache
from planner.solve import tied

LABELS: dict[Objective, str] = {"fewest": "fewest GPUs", "latency": "lowest latency", "balance": "balance"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A placement by another objective: the devices it uses, the KV positions it holds, its times."""

    objective: Objective
    num_devices: int
    kv_tokens: int | None
    estimate: Estimate


def alternatives(problem: Problem, time_limit_s: float | None = None) -> Iterator[Alternative]:
    """The three placements; without that of lowest latency where a device's speed is unknown."""
    speeds = all(device.bandwidth_bytes_per_s and device.flops_per_s for device in problem.machine.devices)
    for objective in LABELS:
        if objective in TIMED and not speeds:
            continue
        asked = replace(problem, objective=objective)
        solution = tied.solve(asked, time_limit_s)
        if solution.status == "INFEASIBLE":  # what there is rests on the host, and has no alternatives
            return
        stages = solution.stages
        yield Alternative(
            objective=objective,
            num_devices=len(stages),
            kv_tokens=longest_cache(asked, stages),
            estimate=Estimate.of(evaluate(asked, stages).times, problem.quantities.batch),
        )
