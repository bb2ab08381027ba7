"""What fits, for a terminal: the largest workload of a machine, and the machines of a workload."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.defaults import rests_on
from planner.plan import Estimate
from planner.report import seconds_text
from planner.units import GIB

Row = tuple[Sequence[str], int, int | None, Estimate]
"""Options, memory in bytes, KV positions per sequence and times of a machine."""


def machines_table(rows: Sequence[Row], command: str, most_cards: int, defaults: Sequence[str]) -> RenderableType:
    """The machines that run a workload, in the order given, each with the options that plan for it.

    `defaults` are what the figures rest on.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("with", no_wrap=True)
    for title in ("GiB in all", "KV positions", "TTFT", "TPOT"):
        table.add_column(title, justify="right", no_wrap=True)
    for options, memory_bytes, kv_tokens, estimate in rows:
        table.add_row(
            " ".join(options),
            f"{memory_bytes / GIB:.1f}",
            "-" if kv_tokens is None else f"{kv_tokens:,}",
            seconds_text(estimate.ttft_s),
            seconds_text(estimate.tpot_s),
        )
    if not rows:
        return Text(f"No machine of up to {most_cards} equal cards from the table holds this.")
    return Group(
        Text(command),
        table,
        Text(
            f"The fewest cards of each kind, up to {most_cards} in a host, by memory in all and then by number: their\n"
            "prices are not known here. Times are estimates, for the placement with most room.\n" + rests_on(defaults),
            style="dim",
        ),
    )
