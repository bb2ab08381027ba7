"""`plan-devices models`: every name that works offline, with its size."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from planner.units import GIB
from planner.workload import ITEMSIZE
from vlm.catalogue import catalogue_names, lookup


def run(argv: Sequence[str]) -> int:
    """Print the catalogue."""
    parser = argparse.ArgumentParser(prog="plan-devices models", description="List the models known by name.")
    parser.parse_args(argv)
    table = Table(box=None, pad_edge=False)
    for title in ("name", "parameters", "GiB", "dtype", "architecture"):
        table.add_column(title, justify="right" if title in ("parameters", "GiB") else "left", no_wrap=True)
    for name in catalogue_names():
        entry = lookup(name)
        weights = entry.parameters * ITEMSIZE[entry.dtype] / GIB
        architecture = str(entry.config["architectures"][0])
        table.add_row(name, f"{entry.parameters:,}", f"{weights:.2f}", entry.dtype, architecture)
    Console(highlight=False).print(table)
    return 0
