"""From a model, a machine and a workload to a plan: the one path that the command line and the runtime share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from planner.constraints import Constraints
from planner.machine import Machine
from planner.plan import ModelSummary, Plan, make_plan
from planner.problem import Objective, Problem
from planner.shortfall import infeasible
from planner.solve import chain_dp, near_home
from planner.workload import Workload
from vlm.model import Model
from vlm.proofs import stored_proof


def plan_for(
    model: Model,
    machine: Machine,
    workload: Workload | None = None,
    constraints: Constraints | None = None,
    *,
    objective: Objective = "balance",
    time_limit_s: float | None = None,
) -> Plan:
    """The best placement of `model` on `machine` by an objective.

    Raises: InfeasibleError with shortfalls and advice when nothing fits; ConstraintError for pins or a context length
    that contradict the model, or a timed objective on devices of unknown speed.
    """
    asked, limits = workload or Workload(), constraints or Constraints()
    problem = replace(problem_for(model, machine, asked, limits), objective=objective)
    return plan_of(model, problem, asked, limits, time_limit_s)


def plan_of(
    model: Model, problem: Problem, asked: Workload, limits: Constraints, time_limit_s: float | None = None
) -> Plan:
    """The plan for a problem that `problem_for` made of the same workload and constraints; raises as `plan_for`."""
    resolved, machine = model.resolved(asked), problem.machine
    solution = near_home.solve(problem, time_limit_s)
    if solution.status == "INFEASIBLE":
        raise infeasible(problem, solution, _changes_that_fit(model, machine, asked, limits))
    graph = problem.graph
    summary = ModelSummary(
        name=model.name,
        architecture=model.architecture,
        num_parameters=graph.num_parameters,
        weight_bytes=graph.weight_bytes,
        dtype=graph.dtype,
    )
    plan = make_plan(problem, solution, model=summary, workload=resolved, fingerprint=model.fingerprint)
    return replace(plan, proof=stored_proof(model.fingerprint, resolved))


def problem_for(model: Model, machine: Machine, workload: Workload, constraints: Constraints) -> Problem:
    """The placement problem of a workload, for `balance`."""
    resolved = model.resolved(workload)
    problem = Problem.of(model.graph(resolved), machine, model.quantities(resolved), constraints)
    return replace(problem, new_tokens=resolved.new_tokens)


def _changes_that_fit(model: Model, machine: Machine, asked: Workload, constraints: Constraints) -> Iterator[str]:
    """Options that make the request fit, each found by solving with it alone."""

    def fits(limits: Constraints = constraints, **changes: Any) -> bool:
        return chain_dp.fits(problem_for(model, machine, replace(asked, **changes), limits))

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
    if model.has_images and not constraints.split_vision and fits(replace(constraints, split_vision=True)):
        yield "--split-vision"
