"""The machines that run a model: of every GPU model in the table the smallest number of cards that holds a workload.

What a machine costs is nobody's fact here. They are listed by their memory in all, which prices follow roughly, and
then by the number of cards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from planner.constraints import Constraints
from planner.defaults import BETWEEN_GPUS, context_default, rate_defaults
from planner.machine import Machine, gpu_presets
from planner.plan import Estimate
from planner.problem import Problem, evaluate, longest_cache
from planner.solve import chain_dp, near_home
from planner.workload import Workload
from vlm.model import Model
from vlm.planning import decided, problem_for

MOST_CARDS = 8
"""Cards in one host: the most that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Equal cards and the options that plan for them, the KV positions per sequence that they hold, and their speed.

    `estimate` is that of the placement with most room; `defaults` are what these figures rest on.
    """

    options: tuple[str, ...]
    num_cards: int
    memory_bytes: int
    kv_tokens: int | None
    estimate: Estimate
    defaults: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("options", "estimate", "defaults")}
        return {"options": list(self.options), **plain, **asdict(self.estimate), "defaults": list(self.defaults)}


def recommended(
    model: Model,
    workload: Workload,
    constraints: Constraints | None = None,
    *,
    context_bytes: int | None = None,
    reserve_bytes: int | None = None,
) -> list[Recommendation]:
    """The machines of one to `MOST_CARDS` equal cards that run `workload`, least memory first.

    Cards without bfloat16 are to run a model of that dtype in float16.
    """
    limits, dtype = constraints or Constraints(), model.resolved(workload).dtype
    found = []
    for preset, entry in gpu_presets().items():
        machines = (Machine.parse(f"{count}x{preset}") for count in range(1, MOST_CARDS + 1))
        prepared = (one.with_overheads(context_bytes=context_bytes, reserve_bytes=reserve_bytes) for one in machines)
        fitting = next(_that_fit(model, workload, limits, prepared), None)
        if fitting is not None:
            chosen, problem = fitting
            in_float16 = dtype == "bfloat16" and not entry.get("bfloat16", True)
            more = (*_precision(workload, chosen), *(("--dtype", "float16") if in_float16 else ()))
            found.append(_recommendation(problem, preset, workload.batch_size, more))
    return sorted(found, key=lambda one: (one.memory_bytes, one.num_cards, one.options))


def _that_fit(
    model: Model, workload: Workload, constraints: Constraints, machines: Iterator[Machine]
) -> Iterator[tuple[Workload, Problem]]:
    """The workload, its precision decided, on each machine that holds it; one of the same precision is built once."""
    problems: dict[Workload, Problem] = {}
    for machine in machines:
        chosen = decided(model, machine, workload, constraints)
        if chosen not in problems:
            problems[chosen] = problem_for(model, machine, chosen, constraints)
        problem = replace(problems[chosen], machine=machine)
        enough = problem.graph.weight_bytes < sum(device.memory_bytes for device in machine.devices)
        if enough and chain_dp.fits(problem):
            yield chosen, problem


def _precision(asked: Workload, chosen: Workload) -> tuple[str, ...]:
    """The options that say what "auto" came to; none where it was not asked for, or weights stay as they are."""
    if asked.quantize != "auto" or chosen.quantize == "none":
        return ()
    return ("--quantize", chosen.quantize, *(("--quantize-vision",) if chosen.quantize_vision else ()))


def _recommendation(problem: Problem, preset: str, batch_size: int, more_options: tuple[str, ...]) -> Recommendation:
    stages, devices = near_home.solve(problem).stages, problem.machine.devices
    return Recommendation(
        options=("--gpus", preset if len(devices) == 1 else f"{len(devices)}x{preset}", *more_options),
        num_cards=len(devices),
        memory_bytes=sum(device.memory_bytes for device in devices),
        kv_tokens=longest_cache(problem, stages),
        estimate=Estimate.of(evaluate(problem, stages).times, batch_size),
        defaults=(*context_default(devices), *rate_defaults(devices), *([BETWEEN_GPUS] if len(stages) > 1 else [])),
    )
