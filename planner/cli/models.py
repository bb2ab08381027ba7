"""`plan-devices models`: every name that works offline, with its size."""

from __future__ import annotations

from collections.abc import Sequence

from planner.cli import options
from planner.units import GIB
from planner.workload import ITEMSIZE
from vlm.catalogue import catalogue_names, lookup, unavailable_names


def run(argv: Sequence[str]) -> int:
    """Print the catalogue."""
    parser = options.Parser(prog="plan-devices models", description="List the models known by name.")
    parser.parse_args(argv)
    entries = {name: lookup(name) for name in catalogue_names()}
    width = max(map(len, entries))
    print(f"{'name':<{width}}  {'parameters':>15}  {'weights':>19}  architecture")
    for name, entry in entries.items():
        weights = f"{entry.parameters * ITEMSIZE[entry.dtype] / GIB:.2f} GiB {entry.dtype}"
        remark = " (partly inferred)" if entry.inferred else ""
        print(f"{name:<{width}}  {entry.parameters:>15,}  {weights:>19}  {entry.config['architectures'][0]}{remark}")
    for name, reason in unavailable_names().items():
        print(f"{name:<{width}}  not by its name: {reason}")
    return 0
