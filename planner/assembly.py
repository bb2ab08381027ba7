"""From a solution to the plan that it amounts to: stages, boundaries, inputs and figures, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from planner.graph import INPUTS, ModuleGraph
from planner.memory import CostTable
from planner.paths import collapse
from planner.plan import (
    HOST,
    Boundary,
    DeviceKey,
    Estimate,
    ModelSummary,
    Offload,
    Plan,
    SolverReport,
    Stage,
    TiedCopies,
    device_key,
)
from planner.polynomial import Quantities
from planner.precision import Quantised
from planner.problem import Evaluation, Problem, Solution, evaluate, host_bytes, longest_cache
from planner.quantisation import kept_modules
from planner.stage_costs import with_costs
from planner.streaming import host_bytes_per_s
from planner.timing import NS_PER_S, at_average_length
from planner.workload import ITEMSIZE, Workload


def make_plan(
    problem: Problem,
    solution: Solution,
    *,
    model: ModelSummary,
    workload: Workload,
    fingerprint: str,
) -> Plan:
    """The plan that a solution amounts to. Inputs are where the graph's home is, or each where it is consumed."""
    graph, machine = problem.graph, problem.machine
    keys = {
        graph.groups[member].id: device_key(machine, stage.device)
        for stage in solution.stages
        for member in stage.members
    }
    resting = {graph.groups[member].id for stage in solution.stages for member in stage.on_host}
    evaluation = evaluate(problem, solution.stages)
    inputs = _input_devices(graph, keys)
    if graph.home is not None:
        inputs = dict.fromkeys(("input_ids", *inputs), device_key(machine, 0))
    boundaries = _boundaries(problem, {**keys, INPUTS: inputs.get("input_ids", next(iter(keys.values())))})
    stages = tuple(_stage(problem, stage.device, stage.members) for stage in solution.stages)
    return Plan(
        model=model,
        machine=machine,
        workload=workload,
        quantities=problem.quantities,
        placement=collapse(
            {module: HOST if group.id in resting else keys[group.id] for group in graph for module in group.modules}
        ),
        input_devices=inputs,
        stages=with_costs(problem, solution.stages, stages, boundaries),
        boundaries=boundaries,
        memory={device_key(machine, position): part for position, part in enumerate(evaluation.memory)},
        kv_tokens=longest_cache(problem, solution.stages),
        solver=SolverReport(
            status=solution.status,
            objective=solution.objective,
            value=solution.value,
            bound=solution.bound,
            gap=solution.gap,
            method=solution.method,
        ),
        fingerprint=fingerprint,
        estimate=Estimate.of(evaluation.times, workload.batch_size),
        extrapolated=graph.extrapolated(problem.quantities),
        assumptions=graph.assumptions,
        tied_copies=tuple(_tied_copies(graph, keys)),
        offload=_offload(problem, solution, evaluation),
        quantization=_quantised(problem, solution, stored=workload.quantize == "none"),
        loading=tuple(device_key(machine, position) for position in sorted(evaluation.loading)),
    )


def _quantised(problem: Problem, solution: Solution, *, stored: bool) -> Quantised | None:
    """What of a placed problem's weights is in fewer bits; None where all are in the model's dtype."""
    graph, plain = problem.graph, problem.graph.plain
    if plain is None:
        return None
    same = replace(problem, graph=plain, table=CostTable.of(plain, problem.quantities))
    times = Estimate.of(evaluate(same, solution.stages).times, problem.quantities.batch)
    layouts = dict(graph.held)
    layers = [linear for group in graph for linear in group.linears if linear.name in layouts]
    plain_bytes = ITEMSIZE[graph.dtype] * sum(linear.num_weights for linear in layers)
    step = at_average_length(problem.quantities, problem.new_tokens)
    (read, launched), (plain_read, plain_launched) = (_step_needs(one, step) for one in (graph, plain))
    return Quantised(
        layouts=tuple(dict.fromkeys(layouts.values())),
        stored=stored,
        kept=kept_modules(graph),
        num_layers=len(layers),
        weight_bytes=plain_bytes - (plain.weight_bytes - graph.weight_bytes),
        plain_bytes=plain_bytes,
        plain_ttft_s=times.ttft_s,
        plain_tpot_s=times.tpot_s,
        read_ratio=_ratio(read, plain_read),
        launch_ratio=_ratio(launched, plain_launched),
    )


def _ratio(count: int, plain: int) -> float | None:
    return round(count / plain, 4) if plain else None


def _step_needs(graph: ModuleGraph, step: Quantities) -> tuple[int, int]:
    """Bytes that one token reads, and kernels that it launches; engines launch none of their own."""
    costs = [group.decode for group in graph if group.decode is not None]
    return sum(cost.moved_bytes(step) for cost in costs), sum(cost.launches(step) for cost in costs)


def _offload(problem: Problem, solution: Solution, evaluation: Evaluation) -> Offload | None:
    """What rests on the host and what that costs; None where nothing does."""
    if not evaluation.streamed:
        return None
    devices, times = problem.machine.devices, evaluation.times
    streamed = evaluation.streamed.items()
    return Offload(
        host_bytes=host_bytes(problem, solution.stages),
        pass_bytes=sum(one.pass_bytes for _, one in streamed),
        copying_s=sum(one.pass_bytes / host_bytes_per_s(devices[position]) for position, one in streamed),
        waiting_s=sum(one.waiting.token_ns for _, one in streamed) / NS_PER_S if times else None,
    )


def _tied_copies(graph: ModuleGraph, keys: Mapping[str, DeviceKey]) -> Iterator[TiedCopies]:
    """Ties whose groups are on several devices."""
    for tie in graph.ties:
        devices = tuple(dict.fromkeys(keys[group] for group in tie.groups))
        if len(devices) > 1:
            yield TiedCopies(groups=tie.groups, devices=devices, num_bytes=tie.num_bytes)


def _stage(problem: Problem, position: int, members: tuple[int, ...]) -> Stage:
    key = device_key(problem.machine, position)
    modules = tuple(module for member in members for module in problem.graph.groups[member].modules)
    return Stage(device=key, modules=tuple(collapse_within(modules, problem.graph)))


def collapse_within(modules: tuple[str, ...], graph: ModuleGraph) -> list[str]:
    """The shortest list of modules that says `modules`, seen against the whole graph's modules."""
    chosen = set(modules)
    marked = collapse({module: module in chosen for group in graph for module in group.modules})
    return [module for module, inside in marked.items() if inside]


def _input_devices(graph: ModuleGraph, keys: Mapping[str, DeviceKey]) -> dict[str, DeviceKey]:
    """Every tensor that the caller hands in, and the device of its first consumer."""
    devices: dict[str, DeviceKey] = {}
    for flow in graph.flows:
        if flow.producer == INPUTS:
            devices.setdefault(flow.tensor, keys[flow.consumers[0]])
    return devices


def _boundaries(problem: Problem, keys: Mapping[str, DeviceKey]) -> tuple[Boundary, ...]:
    """Each crossing tensor once per phase and destination device, as the lean boundaries send it."""
    found: dict[tuple[str, str, DeviceKey, DeviceKey], int] = {}
    for flow in problem.graph.flows:
        if flow.producer == INPUTS:
            continue
        for target in dict.fromkeys(keys[consumer] for consumer in flow.consumers):
            source = keys[flow.producer]
            if source != target:
                found.setdefault((flow.phase, flow.tensor, source, target), flow.num_bytes(problem.quantities))
    return tuple(
        Boundary(phase=phase, tensor=tensor, source=source, target=target, num_bytes=num_bytes)
        for (phase, tensor, source, target), num_bytes in found.items()
    )
