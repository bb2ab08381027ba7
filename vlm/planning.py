"""From a model, a machine and a workload to a plan: the one path that the command line and the runtime share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from planner.constraints import Constraints
from planner.machine import Machine
from planner.plan import ModelSummary, Plan, make_plan
from planner.problem import Problem
from planner.shortfall import infeasible
from planner.solve import chain_dp
from planner.workload import Workload
from vlm.model import Model
from vlm.proofs import stored_proof


def plan_for(
    model: Model, machine: Machine, workload: Workload | None = None, constraints: Constraints | None = None
) -> Plan:
    """The best `balance` placement of `model` on `machine`.

    Raises: InfeasibleError with shortfalls and advice when nothing fits; ConstraintError for pins or a context length
    that contradict the model.
    """
    asked, limits = workload or Workload(), constraints or Constraints()
    resolved = model.resolved(asked)
    problem = _problem(model, machine, resolved, limits)
    solution = chain_dp.solve(problem)
    if solution.status == "INFEASIBLE":
        raise infeasible(problem, solution, _changes_that_fit(model, machine, asked, limits))
    graph = problem.graph
    summary = ModelSummary(
        name=model.name,
        architecture=model.facts.architecture,
        num_parameters=graph.num_parameters,
        weight_bytes=graph.weight_bytes,
        dtype=graph.dtype,
    )
    plan = make_plan(problem, solution, model=summary, workload=resolved, fingerprint=model.fingerprint)
    return replace(plan, proof=stored_proof(model.fingerprint, resolved))


def _problem(model: Model, machine: Machine, resolved: Workload, constraints: Constraints) -> Problem:
    return Problem.of(model.graph(resolved), machine, model.quantities(resolved), constraints)


def _changes_that_fit(model: Model, machine: Machine, asked: Workload, constraints: Constraints) -> Iterator[str]:
    """Options that make the request fit, each found by solving with it alone."""

    def fits(limits: Constraints = constraints, **changes: Any) -> bool:
        changed = model.resolved(replace(asked, **changes))
        return chain_dp.solve(_problem(model, machine, changed, limits)).status == "OPTIMAL"

    resolved = model.resolved(asked)
    if resolved.dtype == "float32" and fits(dtype="float16"):
        yield "--dtype float16"
    if resolved.attention == "eager" and fits(attention="sdpa"):
        yield "--attention sdpa"
    fewer = next((count for count in range(resolved.num_images - 1, 0, -1) if fits(num_images=count)), None)
    if fewer is not None:
        yield f"--num-images {fewer}"
    # A batch of one has no padding and so no mask: it may fit where a smaller padded batch does not.
    if resolved.batch_size == 2 and fits(batch_size=1):
        yield "--batch-size 1"
    if model.facts.vision and not constraints.split_vision and fits(replace(constraints, split_vision=True)):
        yield "--split-vision"
