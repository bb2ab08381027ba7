"""`plan_model`: any module and its forward's keyword arguments, to a plan that a dry run has proven."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from planner.assembly import make_plan
from planner.constraints import Constraints
from planner.errors import UnsupportedModelError
from planner.fit import fit
from planner.graph import ModuleGraph
from planner.machine import Machine
from planner.plan import ModelSummary, Plan
from planner.polynomial import Quantities
from planner.problem import Objective, Problem
from planner.quantisation import Layout, held_in
from planner.shortfall import infeasible
from planner.solve import tied
from planner.workload import Workload
from runtime.proof import DryRun, dry_run
from runtime.steps import Steps, forward_and_decode
from runtime.ties import ties_apart
from runtime.trace import Trace, prompt_of, trace_model
from runtime.traced_graph import sample_of


def plan_model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    machine: Machine,
    workload: Workload | None = None,
    objective: Objective = "balance",
    split_vision: bool = False,
    steps: Steps | None = None,
) -> Plan:
    """The best plan for `model` by an objective, proven by running it on `inputs`.

    The graph is traced from a run on `inputs`, whose sizes are the plan's; of `workload` only `new_tokens`,
    `max_model_len` and `replicate_tied` count. The map is clean under accelerate's hooks, with inputs on device 0.
    Raises: InfeasibleError when nothing fits; UnsupportedModelError when the model leaves a tensor on the host where it
    meets others, which would fail on any GPU; RuntimeError when the plan's own run meets a mismatch that its trace did
    not show, which would be our mistake.
    """
    steps = steps or forward_and_decode()
    asked = _sized(workload or Workload(), inputs, model)
    quantities = _quantities(asked)
    with ties_apart(model, wanted=asked.replicate_tied):
        graph = module_graph(model, inputs, quantities, steps=steps)
    limits = Constraints(split_vision=split_vision)
    problem = replace(Problem.of(graph, machine, quantities, limits), objective=objective, new_tokens=asked.new_tokens)
    plan = plan_of_module(model, problem, asked)
    return replace(plan, proof=_proof(dry_run(model, inputs, plan, hooks="accelerate", steps=steps), inputs))


def plan_of_module(model: nn.Module, problem: Problem, asked: Workload) -> Plan:
    """The best plan for a problem whose graph is that of `model`, not proven.

    Raises: InfeasibleError when nothing fits.
    """
    graph, solution = problem.graph, tied.solve(problem)
    if solution.status == "INFEASIBLE":
        raise infeasible(problem, solution)
    summary = ModelSummary(
        name=type(model).__name__,
        architecture=type(model).__name__,
        num_parameters=graph.num_parameters,
        weight_bytes=graph.weight_bytes,
        dtype=graph.dtype,
    )
    return make_plan(problem, solution, model=summary, workload=asked, fingerprint=fingerprint(model))


def module_graph(
    model: nn.Module, inputs: Mapping[str, Any], quantities: Quantities | None = None, *, steps: Steps | None = None
) -> ModuleGraph:
    """What a run of `model` on `inputs` shows: groups and why they are together, flows, and that run's costs.

    `quantities` are what the inputs amount to; by default their batch and length, as text.
    Raises: UnsupportedModelError when the model refuses the inputs, or leaves a tensor on the host.
    """
    name = type(model).__name__
    trace = trace_model(model, inputs, steps or forward_and_decode())
    refuse_hazards(trace, name)
    counts = quantities or _quantities(_sized(Workload(), inputs, model))
    return fit([sample_of(trace, model, name, counts)])


def problem_of_module(
    model: nn.Module, inputs: Mapping[str, Any], machine: Machine, workload: Workload, layouts: Mapping[str, Layout]
) -> tuple[Problem, Workload]:
    """The placement problem of a run on `inputs` with weights held in `layouts`, and the workload that the run is.

    Raises: as `module_graph`.
    """
    asked = _sized(workload, inputs, model)
    quantities = _quantities(asked)
    graph = held_in(module_graph(model, inputs, quantities), layouts, asked.num_sequences)
    return replace(Problem.of(graph, machine, quantities), new_tokens=asked.new_tokens), asked


def refuse_hazards(trace: Trace, name: str) -> None:
    """Raise UnsupportedModelError when a run met tensors that the model leaves on the host: no plan can help."""
    if trace.hazards:
        raise UnsupportedModelError(
            f"{name} leaves a tensor on the host, which no placement mends: {trace.hazards[0]}. "
            "Make it on the device of what it meets."
        )


def fingerprint(model: nn.Module) -> str:
    """Equal for models of equal parameter names and shapes."""
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _sized(workload: Workload, inputs: Mapping[str, Any], model: nn.Module) -> Workload:
    """`workload` with the inputs' sizes; image positions count as prompt, as inputs do not tell them apart."""
    batch_size, num_tokens = (*prompt_of(inputs).shape, 1)[:2]
    length = num_tokens + workload.new_tokens
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return replace(
        workload,
        batch_size=batch_size,
        num_images=0,
        prompt_tokens=num_tokens,
        max_model_len=max(length, workload.max_model_len or 0),
        dtype=dtype,
        kv_dtype=dtype,
    )


def _quantities(workload: Workload) -> Quantities:
    return Quantities(
        batch=workload.batch_size,
        images=0,
        patches=0,
        text_tokens=workload.prompt_tokens,
        image_tokens=0,
        positions=workload.max_model_len or 0,
    )


def _proof(run: DryRun, inputs: Mapping[str, Any]) -> dict[str, str]:
    if not run.ok:
        raise RuntimeError(f"the plan's own run met what its trace did not show: {run.mismatches[0]}")
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if hasattr(value, "shape"))
    covered = f"{shapes}; {run.num_steps} steps; torch {torch.__version__}"
    return {"status": "proven", "hooks": run.hooks, "workload_class": covered, "fingerprint": _digest(covered)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
