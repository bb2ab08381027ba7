"""What the runs of a device map showed, as findings: who met whom, what stopped, and what other processes would see."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from transformers import PreTrainedModel

from planner.diagnosis.diagnosis import Finding, Place
from planner.diagnosis.map_hazards import has_stable_order
from planner.errors import UnsupportedModelError
from planner.paths import owner
from runtime.diagnosis.classify import mismatch_findings, shown_device
from runtime.diagnosis.map_case import MapCase
from runtime.diagnosis.map_run import MapRun
from runtime.mismatch import Place as CodePlace

MAX_HOMES = 8
"""How many main devices are tried for a map whose main device changes from process to process."""


def run_findings(case: MapCase) -> Iterator[Finding]:
    """Everything that the runs of a case showed.

    Raises: UnsupportedModelError when the model does not even run whole.
    """
    runs = case.executed
    yield from mismatch_findings(case.mismatches, case.roles)
    for run in runs:
        yield from _stop_findings(run, case)
    yield from _literal_findings({place: None for run in runs for place in run.literals})
    yield from _offload_reads(case)
    yield from _other_homes(case)
    yield from _inputs_on_model_device(case)


def _stop_findings(run: MapRun, case: MapCase) -> Iterator[Finding]:
    """An exception that ended the run; UnsupportedModelError when the map has no part in it."""
    if run.stop is None:
        return
    if case.ran({"": case.home}, case.steps).stop is not None:
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


def _offload_reads(case: MapCase) -> Iterator[Finding]:
    for name, place in case.absent_reads.items():
        yield Finding(
            severity="will fail",
            hazard="offload",
            title=f"{name} is kept on {case.given.place(name)} and read while it is on no GPU",
            evidence=("accelerate brings a weight with the module that holds it, for the time that module runs",),
            fix=f"Put {name if name in case.given.placement else name.rpartition('.')[0]} on a GPU.",
            place=str(place),
            modules=(name,),
        )


def _other_homes(case: MapCase) -> Iterator[Finding]:
    """A map of text devices has another main device in every process: each is run."""
    if has_stable_order(case.given) or not case.forward.ok:
        return
    others = [home for home in case.given.gpus if home != case.home][:MAX_HOMES]
    failing = [home for home in others if not case.ran(case.runnable, case.steps, home).ok]
    if failing:
        yield Finding(
            severity="may fail",
            hazard="genio",
            title=f"it fails in processes where the main device is {', '.join(f'cuda:{home}' for home in failing)}",
            evidence=("accelerate takes the first of a set of texts, whose order changes between processes",),
            fix="Write devices as integers, or pass main_device to dispatch_model.",
        )


def _inputs_on_model_device(case: MapCase) -> Iterator[Finding]:
    """What `inputs.to(model.device)` does where the first parameter is not beside the inputs: it is run."""
    if not case.given.gpus:
        return
    first = next(iter(case.names.parameters), None)
    entry = owner(first, case.given.placement) if first is not None else None
    device = case.given.placement[entry] if entry is not None else case.home
    if not isinstance(case.model, PreTrainedModel) or device == case.home or not all(r.ok for r in case.executed):
        return
    if not isinstance(device, int):
        yield _model_device_on_meta(str(first), device)
        return
    runs = [case.ran(case.runnable, steps, inputs_at=device) for steps in case.all_steps]
    failing = [run for run in runs if not run.ok]
    told = f"model.device is cuda:{device}, where {first} is; inputs are read on cuda:{case.home}"
    if not failing:
        case.notes += (f"{told}. inputs.to(model.device) works, and costs copies.",)
        return
    yield Finding(
        severity="may fail",
        hazard="genio",
        title="inputs.to(model.device) sends inputs where they fail",
        evidence=(told, *(shown_device(str(mismatch)) for mismatch in failing[0].mismatches[:3])),
        fix=f'Write inputs.to("cuda:{case.home}"), or put {first} there.',
        modules=(str(first),),
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
