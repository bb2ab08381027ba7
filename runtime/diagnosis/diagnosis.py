"""`diagnose`: any module, inputs and anyone's device map, to what will break, where, why, and the smallest repair.

The verdict is a run's, on virtual GPUs under accelerate's hooks: a forward, decode steps and `generate()`. What no run
shows is added from the map's names, its spelling and the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from planner.diagnosis.coverage import coverage_findings
from planner.diagnosis.diagnosis import Diagnosis, MapCosts, sorted_findings
from planner.diagnosis.map_file import GivenMap, given_map, refuse_unknown_devices
from planner.diagnosis.map_hazards import (
    launcher_findings,
    offload_findings,
    order_findings,
    peer_findings,
    spelling_findings,
)
from planner.errors import ConstraintError, InfeasibleError, PlanMismatchError, UnsupportedModelError
from planner.machine import Machine
from planner.plan import Plan
from planner.quantisation import Layout
from planner.workload import Workload
from runtime.diagnosis.classify import involved
from runtime.diagnosis.held import HeldWeights
from runtime.diagnosis.map_case import MapCase, first_line
from runtime.diagnosis.map_costs import cost_findings, costs_of
from runtime.diagnosis.map_run import STOPS
from runtime.diagnosis.run_findings import run_findings
from runtime.planning import plan_model, plan_of_module, problem_of_module
from runtime.steps import Steps, forward_and_decode
from runtime.trace import prompt_of

NUM_DECODE_STEPS = 2


def diagnose(
    model: nn.Module,
    inputs: Mapping[str, Any],
    device_map: GivenMap | Plan | Mapping[str, Any],
    *,
    machine: Machine | None = None,
    workload: Workload | None = None,
    steps: Steps | None = None,
    environment: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Diagnosis:
    """What is wrong with `device_map` for `model`, whose forward takes `inputs`.

    `machine` adds memory, traffic and idle time, beside a plan of ours for `workload`. `environment` holds launcher
    variables. `steps` replaces the forward and the decode steps that are run. `layouts` are those of linear layers
    whose weights will be in fewer bits: the map is run with plain ones, and memory counted as theirs.
    Raises: PlanMismatchError for a map that is none, or names GPUs that the machine lacks; ConstraintError for a
    machine of several hosts; UnsupportedModelError when the model does not even run whole.
    """
    given = _given(device_map)
    if machine is not None:
        if len(machine.hosts) > 1:
            raise ConstraintError(f"hosts {', '.join(machine.hosts)}: a map is for one process, so for one host")
        refuse_unknown_devices(given, machine)
    held = HeldWeights.of(model, layouts or {}, prompt_of(inputs).numel())
    case = MapCase(model, inputs, given, steps or forward_and_decode(NUM_DECODE_STEPS), held)
    findings = [*coverage_findings(given, case.names, case.home), *spelling_findings(given)]
    findings += [*order_findings(given, case.home), *launcher_findings(given, environment or {})]
    findings += run_findings(case)
    findings += offload_findings(given, case.offloaded_bytes)
    mended = case.repaired() if case.needs_repair else None
    given_costs, our_costs, notes = None, None, case.notes
    if machine is not None:
        asked = workload or Workload()
        given_costs, our_costs, more = _compared(case, machine, asked, _positions(inputs, asked))
        notes += more
        findings += cost_findings(given_costs, our_costs)
        findings += peer_findings(machine, given_costs.crossings) if given_costs is not None else ()
    return Diagnosis(
        model=type(model).__name__,
        origin=given.origin,
        device_map=dict(given.placement),
        findings=sorted_findings(findings),
        runs=case.runs,
        notes=notes,
        repair=mended,
        machine=machine,
        given=given_costs,
        ours=our_costs,
    )


def _given(device_map: GivenMap | Plan | Mapping[str, Any]) -> GivenMap:
    if isinstance(device_map, GivenMap):
        return device_map
    if isinstance(device_map, Plan):
        try:
            return given_map(device_map.device_map, "the plan")
        except ValueError as problem:
            raise PlanMismatchError(f"{problem}: one process runs one host's part") from problem
    return given_map(device_map)


def _positions(inputs: Mapping[str, Any], workload: Workload) -> int:
    """Length of the KV cache that memory is asked for."""
    shape = prompt_of(inputs).shape
    length = (shape[1] if len(shape) > 1 else 1) + workload.new_tokens
    return max(length, workload.max_model_len or 0)


def _compared(
    case: MapCase, machine: Machine, workload: Workload, positions: int
) -> tuple[MapCosts | None, MapCosts | None, tuple[str, ...]]:
    """What the map costs, what a plan of ours would, and why there is none where there is none."""
    failed = tuple(dict.fromkeys(name for m in case.forward.mismatches for name in involved(m)))
    is_run = case.forward.stop is None and case.given.gpus
    given = costs_of("this map", case.costed, machine, positions, failed) if is_run else None
    try:
        plan = _our_plan(case, machine, workload)
    except (InfeasibleError, UnsupportedModelError, ConstraintError, *STOPS) as problem:
        return given, None, (f"No plan of ours to compare with: {first_line(problem)}",)
    ours = MapCase(case.model, case.inputs, given_map(plan.device_map, "our plan"), case.steps, case.held)
    return given, costs_of("our plan", ours.costed, machine, positions), ()


def _our_plan(case: MapCase, machine: Machine, workload: Workload) -> Plan:
    if not case.held.layouts:
        return plan_model(case.model, case.inputs, machine=machine, workload=workload, steps=case.steps)
    problem, asked = problem_of_module(case.model, case.inputs, machine, workload, case.held.layouts)
    return plan_of_module(case.model, problem, asked)
