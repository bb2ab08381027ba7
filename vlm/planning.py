"""From a model, a machine and a workload to a plan: the one path that the command line and the runtime share."""

from __future__ import annotations

from dataclasses import replace

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
    resolved = model.resolved(workload or Workload())
    graph = model.graph(resolved)
    problem = Problem.of(graph, machine, model.quantities(resolved), constraints)
    solution = chain_dp.solve(problem)
    if solution.status == "INFEASIBLE":
        raise infeasible(problem, solution)
    summary = ModelSummary(
        name=model.name,
        architecture=model.facts.architecture,
        num_parameters=graph.num_parameters,
        weight_bytes=graph.weight_bytes,
        dtype=graph.dtype,
    )
    plan = make_plan(problem, solution, model=summary, workload=resolved, fingerprint=model.fingerprint)
    return replace(plan, proof=stored_proof(model.fingerprint, resolved))
