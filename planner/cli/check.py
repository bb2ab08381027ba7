"""`plan-devices check MODEL MAP`: what a device map will break, where and why, and the smallest repair."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from planner.cli import options
from planner.cli.outputs import check_output, write_output
from planner.diagnosis.diagnosis import Diagnosis, Place, sorted_findings
from planner.diagnosis.map_file import GivenMap, read_map_file
from planner.diagnosis.map_hazards import LAUNCHER_VARIABLES
from planner.diagnosis.source_risks import SourceRisk, scan_files, source_findings
from planner.errors import ConstraintError, SourceError
from planner.machine import Machine
from planner.pages.html_page import diagnosis_page
from planner.pages.markdown import diagnosis_markdown
from planner.pages.terminal import diagnosis_report
from planner.quantisation import Layout
from planner.textfile import dump_mapping
from planner.workload import Attention, Dtype

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def run(argv: Sequence[str]) -> int:
    """Diagnose, report, and write what was asked for; 1 when the map is unsafe."""
    arguments = _parser().parse_args([_as_strategy(argument) for argument in argv])
    _check_outputs(arguments)
    diagnosis = _diagnosis(arguments)
    _print(diagnosis, arguments)
    if arguments.report is not None:
        write_output(diagnosis_page(diagnosis), arguments.report)
    if arguments.fix:
        _write_fix(diagnosis, arguments.output)
    return 0 if diagnosis.safe else 1


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        prog="plan-devices check", description="Run MODEL under a device map on virtual GPUs, and say what breaks."
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or a name from `plan-devices models`")
    parser.add_argument("map", metavar="MAP", help=f"a JSON or YAML file, a plan of ours, or {', '.join(STRATEGIES)}")
    options.add_machine_arguments(parser)
    options.add_hub_arguments(parser)
    work = parser.add_argument_group("workload")
    work.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    options.add_quantize_arguments(work, auto=False)
    work.add_argument("--attention", choices=get_args(Attention), default="sdpa")
    work.add_argument("--batch-size", type=options.count, default=1, metavar="N")
    work.add_argument("--num-images", type=options.count, metavar="N", help="per sequence (default 1 for a VLM)")
    work.add_argument("--image-size", type=options.image_size, metavar="WxH", help="in pixels (default: the model's)")
    work.add_argument("--prompt-tokens", type=options.count, default=512, metavar="N", help="text only (default 512)")
    work.add_argument("--new-tokens", type=options.count, default=512, metavar="N", help="to generate (default 512)")
    work.add_argument("--max-model-len", type=options.count, metavar="N", help="KV cache length")
    parser.add_argument(
        "--source",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="Python to look through for lines that no map mends, as text; may be repeated, folders too",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--fix", action="store_true", help="write the repaired map to the file that -o names")
    out.add_argument("-o", "--output", type=Path, metavar="FILE")
    out.add_argument("--report", type=Path, metavar="FILE.html", help="one self-contained page with a picture")
    out.add_argument("--force", action="store_true", help="overwrite files")
    form = out.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", default="text")
    form.add_argument("--markdown", dest="form", action="store_const", const="markdown", help="to paste into an issue")
    return parser


def _check_outputs(arguments: argparse.Namespace) -> None:
    if arguments.fix and arguments.output is None:
        raise ConstraintError("--fix writes the repaired map to a file: name it with -o FILE")
    if arguments.output is not None and not arguments.fix:
        raise ConstraintError("-o names the file for a repaired map: add --fix, or send the report there with > FILE")
    if arguments.report is not None and arguments.report == arguments.output:
        raise ConstraintError(f"--report and -o both name {arguments.output}: one would overwrite the other")
    for path in (arguments.output, arguments.report):
        check_output(path, force=arguments.force)


def _as_strategy(argument: str) -> str:
    """`balanced-low-0` for those who type hyphens."""
    return "balanced_low_0" if argument == "balanced-low-0" else argument


def _diagnosis(arguments: argparse.Namespace) -> Diagnosis:
    from runtime.diagnosis.diagnosis import diagnose
    from runtime.quiet import quiet_libraries
    from runtime.rehearsal import rehearsal
    from vlm.planning import held_layouts

    machine = options.machine_from(arguments)
    written = _written_map(arguments.map)
    risks, notes = _remote_risks(arguments.model)
    risks += scan_files(arguments.source)
    model = options.model_from(arguments)
    workload = model.resolved(options.workload_from(arguments, model))
    layouts = held_layouts(model, workload)
    with quiet_libraries():
        rehearsed = rehearsal(model, workload)
        given = written or _strategys_map(arguments.map, rehearsed.skeleton, machine, layouts, model.config)
        diagnosis = diagnose(
            rehearsed.skeleton,
            rehearsed.inputs,
            given,
            machine=machine,
            workload=workload,
            steps=rehearsed.steps,
            environment={name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ},
            layouts=layouts,
        )
    findings = sorted_findings([*diagnosis.findings, *source_findings(risks)])
    return replace(diagnosis, model=model.name, findings=findings, notes=(*diagnosis.notes, *notes))


def _written_map(text: str) -> GivenMap | None:
    """The map in the file that MAP names; None where it names a strategy. A file wins."""
    if os.path.exists(text):
        return read_map_file(Path(text))
    if text in STRATEGIES:
        return None
    raise SourceError(f"there is no file {text}: name a JSON or YAML file, a plan of ours, or {', '.join(STRATEGIES)}")


def _strategys_map(
    strategy: str, skeleton: Any, machine: Machine, layouts: Mapping[str, Layout], config: Mapping[str, Any]
) -> GivenMap:
    from runtime.diagnosis.auto_maps import auto_map

    if not layouts:
        return auto_map(skeleton, strategy, machine)
    from runtime.quantised import quantised_copy
    from vlm.stored_layouts import quantization_config

    sized, quantiser = quantised_copy(skeleton, layouts, quantization_config(config))
    return auto_map(sized, strategy, machine, quantiser)


def _remote_risks(model: str) -> tuple[tuple[SourceRisk, ...], tuple[str, ...]]:
    """Risks in a checkpoint folder's Python, which `trust_remote_code` would run; a note where it cannot be read."""
    folder = os.path.expanduser(model)
    try:
        return (scan_files([Path(folder)]), ()) if os.path.isdir(folder) else ((), ())
    except SourceError as problem:
        return (), (f"The folder's own code was not looked through: {problem}",)


def _print(diagnosis: Diagnosis, arguments: argparse.Namespace) -> None:
    if arguments.form == "json":
        print(json.dumps(diagnosis.to_dict(), indent=2))
    elif arguments.form == "markdown":
        print(diagnosis_markdown(diagnosis), end="")
    else:
        Console(highlight=False).print(diagnosis_report(diagnosis))


def _write_fix(diagnosis: Diagnosis, output: Path) -> None:
    entries: dict[str, Place] = dict(diagnosis.repair.device_map if diagnosis.repair else diagnosis.device_map)
    is_json = output.suffix.lower() == ".json"
    write_output(json.dumps(entries, indent=2) + "\n" if is_json else dump_mapping(entries), output)
    if diagnosis.repair is not None and not diagnosis.repair.proven:
        raise SourceError(f"the map in {output} is repaired as far as possible, and still not clean: see the findings")
    done = "Repaired map" if diagnosis.repair is not None else "Nothing to repair: the map as given"
    print(f"{done} written to {output}", file=sys.stderr)
