"""`plan-devices explain MODEL`: where the bytes are, and what bounds it on a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from planner.cli import options
from planner.machine import Device, Machine
from planner.pages.explanation import explanation_report
from planner.workload import Attention, Dtype
from vlm.explaining import explain


def run(argv: Sequence[str]) -> int:
    """Print the explanation on stdout."""
    arguments = _parser().parse_args(argv)
    model = options.model_from(arguments)
    found = explain(model, options.workload_from(arguments, model), _devices(arguments))
    if arguments.json:
        json.dump(found.to_dict(), sys.stdout, indent=2)
        print()
        return 0
    Console(highlight=False).print(explanation_report(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        prog="plan-devices explain", description="Say where a model's bytes are, and what bounds it on a GPU."
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or a name from `plan-devices models`")
    options.add_hub_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpus", type=options.machine_spec, metavar="SPEC", help="such as rtx4090, or rtx4090,a100-80g")
    which.add_argument("--machine", type=Path, metavar="FILE", help="machine file (YAML)")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto", help="of weights and activations")
    options.add_quantize_arguments(parser.add_argument_group("precision"), auto=False)
    parser.add_argument("--attention", choices=get_args(Attention), default="sdpa")
    parser.add_argument("--batch-size", type=options.count, default=1, metavar="N")
    parser.add_argument("--num-images", type=options.count, metavar="N", help="per sequence (default 1 for a VLM)")
    parser.add_argument("--image-size", type=options.image_size, metavar="WxH", help="in pixels (default: its own)")
    parser.add_argument("--prompt-tokens", type=options.count, default=512, metavar="N", help="text only (default 512)")
    parser.add_argument("--new-tokens", type=options.count, default=512, metavar="N", help="to generate (default 512)")
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    return parser


def _devices(arguments: argparse.Namespace) -> tuple[Device, ...]:
    """The devices to explain for; none where none are named: no driver is asked."""
    if arguments.machine is not None:
        return Machine.load(arguments.machine).devices
    return arguments.gpus.devices if arguments.gpus is not None else ()
