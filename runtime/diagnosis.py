"""`diagnose`: any module, inputs and anyone's device map, to what will break, where, why, and the smallest repair.

The verdict is a run's, on virtual GPUs under accelerate's hooks: a forward, decode steps and `generate()`. What no run
shows is added from the map's names, its spelling and the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from planner.coverage import ModelNames, coverage_findings, stale_entries, uncovered
from planner.diagnosis import Diagnosis, Finding, MapCosts, Place, Repair, sorted_findings
from planner.errors import ConstraintError, InfeasibleError, UnsupportedModelError
from planner.machine import Machine
from planner.map_file import GivenMap, given_map, refuse_unknown_devices
from planner.map_hazards import (
    has_stable_order,
    launcher_findings,
    main_device,
    offload_findings,
    order_findings,
    peer_findings,
    spelling_findings,
)
from planner.paths import owner
from planner.plan import Plan
from planner.workload import Workload
from runtime.atoms import find_atoms
from runtime.classify import Roles, involved, mismatch_findings
from runtime.cuda_literals import CudaLiterals
from runtime.map_costs import CostedRun, cost_findings, costs_of
from runtime.map_run import STOPS, MapRun, Setting, run_map
from runtime.mismatch import Place as CodePlace
from runtime.planning import plan_model
from runtime.repair import completed, repair
from runtime.steps import Steps, forward_and_decode, generation
from runtime.trace import Trace, prompt_of, trace_model

NUM_DECODE_STEPS = 2
MAX_HOMES = 8
"""How many main devices are tried for a map whose main device changes from process to process."""


def diagnose(
    model: nn.Module,
    inputs: Mapping[str, Any],
    device_map: GivenMap | Plan | Mapping[str, Any],
    *,
    machine: Machine | None = None,
    workload: Workload | None = None,
    steps: Steps | None = None,
    environment: Mapping[str, str] | None = None,
) -> Diagnosis:
    """What is wrong with `device_map` for `model`, whose forward takes `inputs`.

    `machine` adds memory, traffic and idle time, beside a plan of ours for `workload`. `environment` holds launcher
    variables. `steps` replaces the forward and the decode steps that are run.
    Raises: PlanMismatchError for a map that is none, or names GPUs that the machine lacks; UnsupportedModelError when
    the model does not even run whole.
    """
    given = _given(device_map)
    if machine is not None:
        refuse_unknown_devices(given, machine)
    case = _Case(model, inputs, given, steps or forward_and_decode(NUM_DECODE_STEPS))
    findings = [*coverage_findings(given, case.names, case.home), *spelling_findings(given)]
    findings += [*order_findings(given, case.home), *launcher_findings(given, environment or {})]
    findings += case.run_findings()
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


def names_of(model: nn.Module) -> ModelNames:
    """What a map can name of a model."""
    several: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        several.setdefault(id(parameter), []).append(name)
    return ModelNames(
        modules=frozenset(name for name, _ in model.named_modules()),
        parameters={name: p.numel() * p.element_size() for name, p in model.named_parameters()},
        buffers={name: b.numel() * b.element_size() for name, b in model.named_buffers()},
        non_persistent=frozenset(_non_persistent(model)),
        ties=tuple(tuple(group) for group in several.values() if len(group) > 1),
    )


def _non_persistent(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name


class _Case:
    """A map and a model together, and the runs that were made of them."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], given: GivenMap, steps: Steps) -> None:
        self.model, self.inputs, self.given, self.steps = model, inputs, given, steps
        self.names = names_of(model)
        self.home = main_device(given)
        self.notes: tuple[str, ...] = ()
        self._can_generate = isinstance(model, PreTrainedModel) and model.can_generate()

    @cached_property
    def roles(self) -> Roles:
        """Embedding, head and blocks."""
        return Roles.of(self.model)

    @cached_property
    def forward(self) -> MapRun:
        """The run of the map as given, its holes filled or left as the loader leaves them."""
        return self._ran(self.runnable, self.steps)

    @cached_property
    def generated(self) -> MapRun | None:
        """The same for `generate()`; None for a model that has none, or whose own fails on one device too."""
        if not self._can_generate or self.forward.stop is not None:
            return None
        run = self._ran(self.runnable, generation())
        if run.stop is not None and self._ran({"": self.home}, generation()).stop is not None:
            self.notes += (f"generate() was not run: it fails on one device too, with {run.stop.error}",)
            return None
        return run

    @cached_property
    def trace(self) -> Trace | None:
        """What has to be together; None when the model cannot be traced."""
        try:
            with CudaLiterals():
                return trace_model(self.model, self.inputs, self.steps)
        except STOPS as error:
            self.notes += (f"no repair was looked for: tracing stopped with {type(error).__name__}: {error}",)
            return None

    @property
    def runs(self) -> tuple[str, ...]:
        """What was executed."""
        decode = max(0, self.forward.num_steps - 1)
        made = ["prefill", *([f"{decode} decode steps"] if decode else [])]
        return (*made, *(["generate()"] if self.generated is not None else []))

    @property
    def runnable(self) -> Mapping[str, Place]:
        """The map itself, completed where accelerate would refuse it."""
        refused = [name for name in uncovered(self.given, self.names) if name not in self.names.non_persistent]
        return completed(self.given, self.names, self._atoms) if refused else self.given.placement

    @property
    def needs_repair(self) -> bool:
        """Whether a run failed, or names do not match."""
        named = uncovered(self.given, self.names) or stale_entries(self.given, self.names)
        return bool(named or self.absent_reads) or not all(run.ok for run in self.executed)

    @property
    def offloaded_bytes(self) -> int:
        """Weights that entries keep on the host or disk."""
        places = self.given.placement
        return sum(
            num_bytes
            for name, num_bytes in self.names.parameters.items()
            if (entry := owner(name, places)) is not None and entry in self.given.offloaded
        )

    @property
    def costed(self) -> CostedRun:
        """The forward's run, with what of the model lies where."""
        return CostedRun(
            run=self.forward,
            atoms=tuple(self._atoms),
            names=self.names,
            placement=self.runnable,
            home=self.home,
        )

    def repaired(self) -> Repair | None:
        """The smallest change that runs."""
        trace = self.trace
        if trace is None:
            return None
        onto_gpu = {owner(name, self.given.placement) or "" for name in self.absent_reads}
        return repair(self.given, self.names, trace, self._both, home=self.home, onto_gpu=onto_gpu)

    def run_findings(self) -> list[Finding]:
        """What the runs showed."""
        runs = self.executed
        seen = {str(m): m for run in runs for m in run.mismatches}
        found = [*mismatch_findings(seen.values(), self.roles)]
        for run in runs:
            found += _stop_findings(run, self._whole_fails)
        found += _literal_findings({place: None for run in runs for place in run.literals})
        found += self._offload_reads()
        return found + self._other_homes() + self._inputs_on_model_device()

    def _whole_fails(self) -> bool:
        whole = self._ran({"": self.home}, self.steps)
        return whole.stop is not None

    def _both(self, placement: Mapping[str, Place]) -> MapRun:
        """A forward, then `generate()` when that was clean."""
        run = self._ran(placement, self.steps)
        if not run.ok or self.generated is None:
            return run
        return self._ran(placement, generation())

    def _ran(self, placement: Mapping[str, Place], steps: Steps, home: int | None = None) -> MapRun:
        home = self.home if home is None else home
        return run_map(self.model, self.inputs, self._setting(placement, home), steps)

    def _setting(self, placement: Mapping[str, Place], home: int) -> Setting:
        """Offloaded modules compute where inputs are; tables without an entry stay on the host, as loaded."""
        on_host = frozenset(name for name in self.names.non_persistent if owner(name, placement) is None)
        indices = {name: place if isinstance(place, int) else home for name, place in placement.items()}
        known = {name: index for name, index in indices.items() if self._is_known(name)}
        return Setting(placement=known, home=home, on_host=on_host)

    def _is_known(self, name: str) -> bool:
        return name in self.names.modules or name in self.names.tensors

    @cached_property
    def _atoms(self) -> Sequence[str]:
        return [atom.name for atom in find_atoms(self.model)]

    @property
    def executed(self) -> list[MapRun]:
        """The runs of the map as given."""
        return [run for run in (self.forward, self.generated) if run is not None]

    @property
    def absent_reads(self) -> dict[str, CodePlace]:
        """Weights kept on the host that are read while their module does not run: they are not there then."""
        reads = {name: place for run in self.executed for name, place in run.raw_reads.items()}
        places, offloaded = self.given.placement, self.given.offloaded
        return {name: place for name, place in reads.items() if owner(name, places) in offloaded}

    def _offload_reads(self) -> Iterator[Finding]:
        for name, place in self.absent_reads.items():
            yield Finding(
                severity="will fail",
                hazard="offload",
                title=f"{name} is kept on the host and read while its module does not run",
                evidence=("accelerate brings a weight for the time its module's forward runs; here it is still empty",),
                fix=f"Put {name.rpartition('.')[0]} on a GPU.",
                place=str(place),
                modules=(name,),
            )

    def _inputs_on_model_device(self) -> list[Finding]:
        """What `inputs.to(model.device)` does where the first parameter is not beside the inputs: it is run."""
        first = next(iter(self.names.parameters), None)
        entry = owner(first, self.given.placement) if first is not None else None
        device = self.given.placement[entry] if entry is not None else self.home
        if not isinstance(self.model, PreTrainedModel) or device == self.home or not all(r.ok for r in self.executed):
            return []
        if not isinstance(device, int):
            return [_model_device_on_meta(str(first), device)]
        setting = replace(self._setting(self.runnable, self.home), inputs_at=device)
        failing = [run for steps in self._all_steps if not (run := run_map(self.model, self.inputs, setting, steps)).ok]
        told = f"model.device is cuda:{device}, where {first} is; inputs are read on cuda:{self.home}"
        if not failing:
            self.notes += (f"{told}. inputs.to(model.device) works, and costs copies.",)
            return []
        return [
            Finding(
                severity="may fail",
                hazard="genio",
                title="inputs.to(model.device) sends inputs where they fail",
                evidence=(told, *(str(mismatch) for mismatch in failing[0].mismatches[:3])),
                fix=f'Write inputs.to("cuda:{self.home}"), or put {first} there.',
                modules=(str(first),),
            )
        ]

    @property
    def _all_steps(self) -> list[Steps]:
        return [self.steps, *([generation()] if self.generated is not None else [])]

    def _other_homes(self) -> list[Finding]:
        """A map of text devices has another main device in every process: each is run."""
        if has_stable_order(self.given) or not self.forward.ok:
            return []
        others = [home for home in self.given.gpus if home != self.home][:MAX_HOMES]
        failing = [home for home in others if not self._ran(self.runnable, self.steps, home).ok]
        if not failing:
            return []
        return [
            Finding(
                severity="may fail",
                hazard="genio",
                title=f"it fails in processes where the main device is {', '.join(f'cuda:{home}' for home in failing)}",
                evidence=("accelerate takes the first of a set of texts, whose order changes between processes",),
                fix="Write devices as integers, or pass main_device to dispatch_model.",
            )
        ]


def _given(device_map: GivenMap | Plan | Mapping[str, Any]) -> GivenMap:
    if isinstance(device_map, GivenMap):
        return device_map
    if isinstance(device_map, Plan):
        return given_map(device_map.device_map, "the plan")
    return given_map(device_map)


def _stop_findings(run: MapRun, whole_fails: Callable[[], bool]) -> Iterator[Finding]:
    """An exception that ended the run; UnsupportedModelError when the map has no part in it."""
    if run.stop is None:
        return
    if whole_fails():
        raise UnsupportedModelError(
            f"the model does not run on one device either: {run.stop.error} at {run.stop.place}. "
            "Give inputs that its forward takes."
        )
    yield Finding(
        severity="will fail",
        hazard="model",
        title=f"{run.stop.phase} stops with {run.stop.error}",
        evidence=("the same model and inputs run on one device",),
        fix="Look at that line: it does what only a model on one device can.",
        place=str(run.stop.place or ""),
    )


def _model_device_on_meta(first: str, place: Place) -> Finding:
    return Finding(
        severity="may fail",
        hazard="offload",
        title=f"the model's first parameter is on {place}, so model.device is meta",
        evidence=(f"{first} is brought to a GPU only while its module runs; inputs.to(model.device) drops the inputs",),
        fix=f"Put {first.rpartition('.')[0] or first} on a GPU.",
        modules=(first,),
    )


def _literal_findings(places: Collection[CodePlace]) -> Iterator[Finding]:
    if places:
        yield Finding(
            severity="may fail",
            hazard="hardcuda",
            title=f"code that ran names a CUDA device, on {len(places)} line{'s'[: len(places) != 1]}",
            evidence=tuple(map(str, places)),
            fix="Take the device from what the tensor meets: x.device.",
            place=str(next(iter(places))),
        )


def _positions(inputs: Mapping[str, Any], workload: Workload) -> int:
    """Length of the KV cache that memory is asked for."""
    shape = prompt_of(inputs).shape
    length = (shape[1] if len(shape) > 1 else 1) + workload.new_tokens
    return max(length, workload.max_model_len or 0)


def _compared(
    case: _Case, machine: Machine, workload: Workload, positions: int
) -> tuple[MapCosts | None, MapCosts | None, tuple[str, ...]]:
    """What the map costs, what a plan of ours would, and why there is none where there is none."""
    failed = tuple(dict.fromkeys(name for run in (case.forward,) for m in run.mismatches for name in involved(m)))
    given = costs_of("this map", case.costed, machine, positions, failed) if case.forward.stop is None else None
    try:
        plan = plan_model(case.model, case.inputs, machine=machine, workload=workload, steps=case.steps)
    except (InfeasibleError, UnsupportedModelError, ConstraintError) as problem:
        return given, None, (f"no plan of ours to compare with: {str(problem).splitlines()[0]}",)
    ours = _Case(case.model, case.inputs, given_map(plan.device_map, "our plan"), case.steps)
    return given, costs_of("our plan", ours.costed, machine, positions), ()
