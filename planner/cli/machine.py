"""`plan-devices machine`: the machine that plans are made for here, as a machine file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from planner.cli import options
from planner.textfile import dump_mapping


def run(argv: Sequence[str]) -> int:
    """Print the GPUs found here, or what the options describe, as YAML that --machine reads back."""
    parser = options.Parser(prog="plan-devices machine", description="Print a machine as a machine file.")
    options.add_machine_arguments(parser)
    sys.stdout.write(dump_mapping(options.machine_from(parser.parse_args(argv)).to_dict()))
    return 0
