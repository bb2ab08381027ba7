"""`plan-devices [plan] MODEL`: the plan on stdout or in a file, the reasoning on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from planner.cli import options
from planner.constraints import Constraints
from planner.errors import ConstraintError, SourceError
from planner.machine import Machine
from planner.plan import Plan
from planner.report import report
from planner.textfile import dump_mapping, write_atomically
from planner.workload import Attention, Dtype, Workload
from vlm.model import Model, find_model
from vlm.planning import plan_for

FORMATS = ("yaml", "json", "device-map")


def run(argv: Sequence[str]) -> int:
    """Plan, write the result, and explain it."""
    arguments = _parser().parse_args(argv)
    _check_output(arguments)
    model = find_model(arguments.model)
    machine = options.machine_from(arguments)
    console = Console(stderr=True, highlight=False, quiet=arguments.quiet)
    for note in _notes(model, arguments):
        console.print(note, markup=False)
    constraints = Constraints(pins=_pins(machine, arguments.pin), split_vision=arguments.split_vision)
    plan = plan_for(model, machine, _workload(model, arguments), constraints)
    if arguments.prove:
        from runtime.proving import prove

        plan = prove(model, plan)
    _write(_rendered(plan, arguments.format), arguments.output)
    console.print(report(plan))
    longest = model.facts.max_position_embeddings
    if plan.quantities.positions > longest:
        console.print(f"{plan.quantities.positions} positions are more than the {longest} the model was made for")
    if arguments.output:
        console.print(f"Plan written to {arguments.output}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(prog="plan-devices", description="Plan which GPU each module of MODEL goes to.")
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or a name from `plan-devices models`")
    options.add_machine_arguments(parser)
    work = parser.add_argument_group("workload")
    work.add_argument("--dtype", choices=get_args(Dtype), default="auto", help="of weights and activations")
    work.add_argument("--attention", choices=get_args(Attention), default="sdpa")
    work.add_argument("--batch-size", type=options.count, default=1, metavar="N")
    work.add_argument("--num-images", type=options.count, metavar="N", help="per sequence (default 1 for a VLM)")
    work.add_argument(
        "--image-size", type=options.image_size, metavar="WxH", help="in pixels (default: the model's own)"
    )
    work.add_argument("--prompt-tokens", type=options.count, default=512, metavar="N", help="text only (default 512)")
    work.add_argument("--new-tokens", type=options.count, default=512, metavar="N", help="to generate (default 512)")
    work.add_argument(
        "--max-model-len", type=options.count, metavar="N", help="KV cache length (default: what the request needs)"
    )
    where = parser.add_argument_group("placement")
    where.add_argument("--pin", type=options.pin, action="append", default=[], metavar="MODULE=DEVICE")
    where.add_argument("--split-vision", action="store_true", help="let the vision encoder leave the token embedding")
    where.add_argument("--prove", action="store_true", help="run the plan at full size on virtual GPUs (needs torch)")
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan here instead of stdout")
    out.add_argument("--force", action="store_true", help="overwrite FILE")
    out.add_argument("--format", choices=FORMATS, default="yaml")
    out.add_argument("--json", dest="format", action="store_const", const="json", help="same as --format json")
    out.add_argument("--quiet", action="store_true", help="no reasoning on stderr")
    return parser


def _pins(machine: Machine, asked: Sequence[tuple[str, str]]) -> dict[str, int]:
    pins: dict[str, str] = {}
    for name, device in asked:
        if pins.setdefault(name, device) != device:
            raise ConstraintError(f"pins {name}={pins[name]} and {name}={device} contradict each other. Drop one.")
    return {name: machine.position(device) for name, device in pins.items()}


def _workload(model: Model, arguments: argparse.Namespace) -> Workload:
    images = arguments.num_images
    if images and model.facts.vision is None:
        raise ConstraintError(f"--num-images {images}: {model.name} is a language model and takes no images")
    try:
        return Workload(
            batch_size=arguments.batch_size,
            num_images=1 if images is None else images,
            image_size=arguments.image_size,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.new_tokens,
            max_model_len=arguments.max_model_len,
            dtype=arguments.dtype,
            attention=arguments.attention,
        )
    except ValueError as problem:
        raise ConstraintError(str(problem)) from problem


def _notes(model: Model, arguments: argparse.Namespace) -> list[str]:
    where = arguments.model if model.origin == "folder" else "the catalogue"
    notes = [f"{model.name}: {model.origin} ({where})" if model.origin == "folder" else f"{model.name}: from {where}"]
    if arguments.image_size and model.facts.vision:
        side = model.facts.vision.image_size
        notes.append(f"--image-size changes nothing: {model.name} resizes every picture to {side}x{side}")
    return notes


def _rendered(plan: Plan, form: str) -> str:
    if form == "json":
        return json.dumps(plan.to_dict(), indent=2) + "\n"
    if form == "device-map":
        try:
            return dump_mapping(plan.device_map)
        except ValueError as problem:
            raise ConstraintError(f"--format device-map: {problem}") from problem
    return plan.to_yaml()


def _check_output(arguments: argparse.Namespace) -> None:
    """Say what is wrong with -o before any work is done."""
    output: Path | None = arguments.output
    if output is None:
        return
    try:
        exists = output.exists()
    except OSError as problem:
        raise SourceError(f"{output} cannot be written: {problem.strerror}") from problem
    if exists and output.is_dir():
        raise ConstraintError(f"{output} is a folder: name a file in it with -o")
    if exists and not arguments.force:
        raise ConstraintError(f"{output} exists: choose another -o FILE, or overwrite it with --force")
    if not output.parent.is_dir():
        raise ConstraintError(f"{output.parent} is no folder: create it before writing {output.name} there")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
        return
    try:
        write_atomically(output, text)
    except OSError as problem:
        raise SourceError(f"{output} cannot be written: {problem.strerror}") from problem
