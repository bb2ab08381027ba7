"""The answer, and why: a value that is written to YAML, read back equal, and obeyed by whatever loads the model.

The same question gives the same bytes: no time, host name or date is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from planner.errors import MachineError, PlanMismatchError, SourceError
from planner.graph import INPUTS, ModuleGraph
from planner.machine import Machine
from planner.memory import MemoryBreakdown
from planner.paths import collapse
from planner.polynomial import Quantities
from planner.problem import Problem, Solution, evaluate, longest_cache
from planner.textfile import dump_mapping, parse_mapping, read_mapping, write_atomically
from planner.timing import NS_PER_S, PlacementTimes
from planner.workload import Workload

FORMAT = "plan-devices/1"

Record = TypeVar("Record")
DeviceKey = int | str
"""What a device map's values are: an index on a single host, `host/cuda:1` where there are several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """Which model the plan is for, in the plan's own dtype."""

    name: str
    architecture: str
    num_parameters: int
    weight_bytes: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A contiguous part of the model on one device, in execution order; `modules` are device-map keys."""

    device: DeviceKey
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """One tensor that crosses from one device to another, once per pass of its phase."""

    source: DeviceKey
    target: DeviceKey
    tensor: str
    phase: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverReport:
    """How good the placement provably is: the objective's value, and the best possible as `bound`.

    Both are extra KV positions per sequence for `balance` and `fewest`, nanoseconds for `latency` and `throughput`.
    """

    status: str
    objective: str
    value: int
    bound: int
    gap: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds until the first token, and per further token of one stream; tokens per second of the whole batch.

    None where the speed of a device is unknown. Decode is estimated at the answer's average cache length.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens_per_s: float | None = None

    @classmethod
    def of(cls, times: PlacementTimes | None, batch_size: int) -> Estimate:
        """The estimate that a placement's times amount to."""
        if times is None:
            return cls()
        ttft_s, tpot_s = times.total.first_ns / NS_PER_S, times.total.token_ns / NS_PER_S
        return cls(ttft_s=ttft_s, tpot_s=tpot_s, tokens_per_s=round(batch_size / tpot_s, 3) if tpot_s else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where every module goes, what that costs, and what was asked.

    `placement` maps modules to devices in its shortest form; `device_map` is the same for a single host.
    `extrapolated` names counts of the workload that lie outside what the costs were traced for, `assumptions` what all
    costs rest on where there was nothing to trace.
    """

    model: ModelSummary
    machine: Machine
    workload: Workload
    quantities: Quantities
    placement: Mapping[str, DeviceKey]
    input_devices: Mapping[str, DeviceKey]
    stages: tuple[Stage, ...]
    boundaries: tuple[Boundary, ...]
    memory: Mapping[DeviceKey, MemoryBreakdown]
    kv_tokens: int | None
    solver: SolverReport
    fingerprint: str
    proof: Mapping[str, str] = field(default_factory=lambda: {"status": "unproven"})
    estimate: Estimate = field(default_factory=Estimate)
    extrapolated: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()

    @property
    def device_map(self) -> dict[str, DeviceKey]:
        """What transformers' `from_pretrained(device_map=...)` takes.

        Raises: ValueError for a plan over several hosts, where `device_map_for(host)` answers.
        """
        if len(self.machine.hosts) > 1:
            raise ValueError(f"the plan spans hosts {', '.join(self.machine.hosts)}: use device_map_for(host)")
        return dict(self.placement)

    def device_map_for(self, host: str) -> dict[str, int]:
        """The part of the map that lies on `host`, with that host's own device indices.

        Raises: ValueError for a host that the machine does not have.
        """
        if host not in self.machine.hosts:
            raise ValueError(f"no host {host!r} in this plan: hosts are {', '.join(self.machine.hosts) or 'unnamed'}")
        index = {device_key(self.machine, p): d.index for p, d in enumerate(self.machine.devices) if d.host == host}
        return {module: index[key] for module, key in self.placement.items() if key in index}

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the plan file's order."""
        return {
            "format": FORMAT,
            "model": asdict(self.model),
            "machine": self.machine.to_dict(),
            "workload": _workload_to(self.workload),
            "quantities": asdict(self.quantities),
            "device_map": dict(self.placement),
            "input_devices": dict(self.input_devices),
            "stages": [{"device": s.device, "modules": list(s.modules)} for s in self.stages],
            "boundaries": [asdict(boundary) for boundary in self.boundaries],
            "memory": {key: {**asdict(part), "total_bytes": part.total_bytes} for key, part in self.memory.items()},
            "capacity": {"kv_tokens": self.kv_tokens, "extrapolated": list(self.extrapolated)},
            **({"assumptions": list(self.assumptions)} if self.assumptions else {}),
            "estimate": asdict(self.estimate),
            "solver": asdict(self.solver),
            "proof": dict(self.proof),
            "fingerprints": {"model": self.fingerprint},
        }

    def to_yaml(self) -> str:
        """The plan file's text."""
        return dump_mapping(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write the plan file atomically."""
        write_atomically(Path(path), self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a YAML or JSON file.

        Raises: SourceError when it cannot be read, is of another format, or lacks a part.
        """
        return cls.from_dict(read_mapping(Path(path), "plan", SourceError), f"plan {path}")

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        """The plan in a text."""
        return cls.from_dict(parse_mapping(text, "plan", SourceError), "plan")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "plan") -> Plan:
        """The inverse of `to_dict`; derived parts are read as they stand."""
        if content.get("format") != FORMAT:
            raise SourceError(f"{where} has format {content.get('format')!r}: this version reads {FORMAT}")
        try:
            return _plan_from(content)
        except (KeyError, TypeError, ValueError, AttributeError, MachineError) as problem:
            detail = f"lacks {problem}" if isinstance(problem, KeyError) else str(problem)
            raise SourceError(
                f"{where} is damaged: {detail}. Make it anew with plan-devices MODEL -o FILE"
            ) from problem

    def check_model(self, fingerprint: str, what: str) -> None:
        """Refuse a model other than the one planned.

        Raises: PlanMismatchError.
        """
        if fingerprint != self.fingerprint:
            raise PlanMismatchError(
                f"the plan is for {self.model.name} ({self.fingerprint}), and {what} has other weights "
                f"({fingerprint}). Plan that checkpoint: plan-devices {what} --gpus ..."
            )


def device_key(machine: Machine, position: int) -> DeviceKey:
    """The device's value in maps: its index on a single host, its full name otherwise."""
    device = machine.devices[position]
    return device.name if len(machine.hosts) > 1 else device.index


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
    evaluation = evaluate(problem, solution.stages)
    inputs = _input_devices(graph, keys)
    if graph.home is not None:
        inputs = dict.fromkeys(("input_ids", *inputs), device_key(machine, 0))
    return Plan(
        model=model,
        machine=machine,
        workload=workload,
        quantities=problem.quantities,
        placement=collapse({module: keys[group.id] for group in graph for module in group.modules}),
        input_devices=inputs,
        stages=tuple(_stage(problem, stage.device, stage.members) for stage in solution.stages),
        boundaries=_boundaries(problem, {**keys, INPUTS: inputs.get("input_ids", next(iter(keys.values())))}),
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
        estimate=Estimate.of(evaluation.times, problem.quantities.batch),
        extrapolated=graph.extrapolated(problem.quantities),
        assumptions=graph.assumptions,
    )


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


def _workload_to(workload: Workload) -> dict[str, Any]:
    content = asdict(workload)
    content["image_size"] = list(workload.image_size) if workload.image_size else None
    return content


def _plan_from(content: Mapping[str, Any]) -> Plan:
    workload = dict(content["workload"])
    if workload.get("image_size"):
        workload["image_size"] = tuple(workload["image_size"])
    machine = Machine.from_dict(content["machine"])
    plan = Plan(
        model=_record(ModelSummary, content["model"]),
        machine=machine,
        workload=_record(Workload, workload),
        quantities=_record(Quantities, content["quantities"]),
        placement=_placement(content, "device_map", machine),
        input_devices=_placement(content, "input_devices", machine),
        stages=tuple(Stage(device=s["device"], modules=tuple(s["modules"])) for s in content["stages"]),
        boundaries=tuple(_record(Boundary, boundary) for boundary in content["boundaries"]),
        memory={_key_from(key): _memory_from(parts) for key, parts in content["memory"].items()},
        kv_tokens=content["capacity"]["kv_tokens"],
        solver=_record(SolverReport, content["solver"]),
        fingerprint=str(content["fingerprints"]["model"]),
        proof=dict(content["proof"]),
        estimate=_estimate_from(content["estimate"]),
        extrapolated=tuple(map(str, content["capacity"].get("extrapolated", ()))),
        assumptions=tuple(map(str, content.get("assumptions", ()))),
    )
    if "input_ids" not in plan.input_devices:
        raise ValueError(f"input_devices names {list(plan.input_devices)}, not input_ids")
    if "auto" in (plan.workload.dtype, plan.workload.kv_dtype):
        raise ValueError("the workload's dtype is auto: a plan is for one dtype")
    if list(plan.memory) != _keys(machine):
        raise ValueError(f"memory lists devices {list(plan.memory)}, the machine has {_keys(machine)}")
    return plan


def _estimate_from(content: Mapping[str, Any]) -> Estimate:
    wrong = {name: value for name, value in content.items() if type(value) not in (int, float, type(None))}
    if wrong:
        raise TypeError(f"estimate has {wrong}: seconds and rates are numbers, or null where unknown")
    return Estimate(**content)


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "str": (str,), "float": (int, float)}


def _record(kind: type[Record], content: Mapping[str, Any]) -> Record:
    """A dataclass of plain values, with each value's type checked.

    Raises: TypeError naming the field.
    """
    value = kind(**content)
    for part in fields(value):  # type: ignore[arg-type]
        found, expected = getattr(value, part.name), _TYPES.get(str(part.type))
        if expected and (isinstance(found, bool) or not isinstance(found, expected)):
            raise TypeError(f"{part.name} is {found!r}, not {part.type}")
    return value


def _placement(content: Mapping[str, Any], name: str, machine: Machine) -> dict[str, DeviceKey]:
    """A map from names to the machine's devices; ValueError for any other device."""
    placement, known = dict(content[name]), _keys(machine)
    wrong = [f"{module}: {key!r}" for module, key in placement.items() if key not in known]
    if wrong:
        raise ValueError(f"{name} says {', '.join(wrong[:3])}; the machine's devices are {known}")
    return placement


def _keys(machine: Machine) -> list[DeviceKey]:
    return [device_key(machine, position) for position in range(len(machine.devices))]


def _memory_from(parts: Mapping[str, int]) -> MemoryBreakdown:
    return MemoryBreakdown(**{part.name: int(parts[part.name]) for part in fields(MemoryBreakdown)})


def _key_from(key: DeviceKey) -> DeviceKey:
    """JSON knows no integer keys; a device map does."""
    return int(key) if isinstance(key, str) and key.isdigit() else key
