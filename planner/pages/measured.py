"""Predicted beside measured figures, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.report import seconds_text
from planner.units import format_bytes

CLOCK = "clock"
"""The meter of seconds; every other one is of bytes."""


class Compared(Protocol):
    """One figure: what it is of, where, by which meter, as predicted and as measured."""

    @property
    def what(self) -> str: ...
    @property
    def where(self) -> str: ...
    @property
    def meter(self) -> str: ...
    @property
    def predicted(self) -> float | None: ...
    @property
    def measured(self) -> float: ...
    @property
    def ratio(self) -> float | None: ...


def measured_page(rows: Sequence[Compared], lines: Sequence[str]) -> RenderableType:
    """Sentences on what ran, and a table of all figures."""
    table = Table(box=None, pad_edge=False)
    for title in ("", "", "meter"):
        table.add_column(title, no_wrap=True)
    for title in ("predicted", "measured", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        show = seconds_text if row.meter == CLOCK else _bytes_text
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.what, row.where, row.meter, show(row.predicted), show(row.measured), ratio)
    return Group(*(Text(line) for line in lines), Text(), table)


def _bytes_text(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else format_bytes(round(num_bytes))
