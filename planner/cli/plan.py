"""`plan-devices [plan] MODEL`: the plan on stdout or in a file, the reasoning on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from planner.alternatives import alternatives
from planner.cli import options
from planner.cli.outputs import check_output, write_output
from planner.cli.proof import proven
from planner.constraints import Constraints
from planner.errors import ConstraintError
from planner.graph_export import module_graph_content
from planner.machine import Machine
from planner.pages.html_page import plan_page
from planner.plan import Plan
from planner.problem import Objective, Problem
from planner.report import alternatives_table, report
from planner.textfile import dump_mapping
from planner.workload import Attention, Dtype
from vlm.planning import plan_of, problem_for

FORMATS = ("yaml", "json", "device-map")


def run(argv: Sequence[str]) -> int:
    """Plan, write the result, and explain it."""
    arguments = _parser().parse_args(argv)
    for path in (arguments.output, arguments.report, arguments.save_graph):
        check_output(path, force=arguments.force)
    if options.names_a_file(arguments.model):
        from planner.cli import graph_file

        return graph_file.run(arguments)
    model = options.model_from(arguments)
    machine = options.machine_from(arguments)
    console = Console(stderr=True, highlight=False, quiet=arguments.quiet)
    where = f"from the {model.origin}" if model.origin != "folder" else f"folder ({arguments.model})"
    console.print(f"{model.name}: {where}", markup=False)
    constraints = Constraints(
        pins=_pins(machine, arguments.pin),
        split_vision=arguments.split_vision,
        all_devices=arguments.all_devices,
    )
    workload = options.workload_from(arguments, model)
    problem = replace(problem_for(model, machine, workload, constraints), objective=arguments.objective or "balance")
    if arguments.image_size and model.fixed_image_px:  # asked only now, when the workload's costs are known
        size = "x".join(map(str, model.fixed_image_px))
        console.print(f"--image-size changes nothing: {model.name} resizes every picture to {size}", markup=False)
    plan = plan_of(model, problem, workload, constraints, arguments.time_limit)
    if arguments.no_proof:
        plan = replace(plan, proof={"status": "skipped"})
    else:
        plan = proven(model, plan, console, anew=arguments.prove)
    _write(_rendered(plan, arguments.format), arguments.output)
    if arguments.report is not None:
        write_output(plan_page(plan, problem.graph), arguments.report)
    if arguments.save_graph is not None:
        write_output(_graph_file(problem, split_vision=arguments.split_vision), arguments.save_graph)
    console.print(report(plan))
    if not arguments.quiet:
        console.print(alternatives_table(alternatives(problem, arguments.time_limit), plan.solver.objective))
    longest = model.max_positions
    if longest is not None and plan.quantities.positions > longest:
        console.print(f"{plan.quantities.positions} positions are more than the {longest} the model was made for")
    if arguments.output:
        console.print(f"Plan written to {arguments.output}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(prog="plan-devices", description="Plan which GPU each module of MODEL goes to.")
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, a name from `plan-devices models`, or a module-graph file"
    )
    options.add_machine_arguments(parser)
    options.add_hub_arguments(parser)
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
    where.add_argument(
        "--objective",
        choices=get_args(Objective),
        help="most room on all GPUs (default), shortest answer, most answers per second, or fewest GPUs",
    )
    where.add_argument("--all-devices", action="store_true", help="leave no device empty, whatever that costs")
    where.add_argument(
        "--time-limit", type=options.seconds, metavar="S", help="then take the best placement found, with its gap"
    )
    proof = where.add_mutually_exclusive_group()
    proof.add_argument("--prove", action="store_true", help="run the plan at full size even where a proof is on file")
    proof.add_argument("--no-proof", action="store_true", help="make no run to prove the plan, and say so in it")
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan here instead of stdout")
    out.add_argument("--force", action="store_true", help="overwrite FILE")
    out.add_argument("--format", choices=FORMATS, default="yaml")
    out.add_argument("--json", dest="format", action="store_const", const="json", help="same as --format json")
    out.add_argument("--save-graph", type=Path, metavar="FILE.json", help="the placement problem, for other tools")
    out.add_argument("--report", type=Path, metavar="FILE.html", help="one self-contained page with a picture")
    out.add_argument("--quiet", action="store_true", help="no reasoning on stderr")
    return parser


def _pins(machine: Machine, asked: Sequence[tuple[str, str]]) -> dict[str, int]:
    pins: dict[str, str] = {}
    for name, device in asked:
        if pins.setdefault(name, device) != device:
            raise ConstraintError(f"pins {name}={pins[name]} and {name}={device} contradict each other. Drop one.")
    return {name: machine.position(device) for name, device in pins.items()}


def _rendered(plan: Plan, form: str) -> str:
    if form == "json":
        return json.dumps(plan.to_dict(), indent=2) + "\n"
    if form == "device-map":
        try:
            return dump_mapping(plan.device_map)
        except ValueError as problem:
            raise ConstraintError(f"--format device-map: {problem}") from problem
    return plan.to_yaml()


def _graph_file(problem: Problem, *, split_vision: bool) -> str:
    content = module_graph_content(
        problem.graph, problem.quantities, problem.machine, problem.new_tokens, split_vision=split_vision
    )
    return json.dumps(content, indent=2) + "\n"


def _write(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
    else:
        write_output(text, output)
