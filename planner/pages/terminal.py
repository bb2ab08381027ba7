"""A diagnosis as a person reads it in a terminal: rich renderables. Never prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from planner.diagnosis.diagnosis import DeviceLoad, Diagnosis, Finding, MapCosts, Repair
from planner.report import memory_bar, short_names
from planner.units import GIB, format_bytes

_STYLES = {"will fail": "bold red", "may fail": "bold yellow", "wasteful": "bold blue"}
_DIFF_STYLES = {"-": "red", "+": "green", "@": "cyan"}
MAX_EVIDENCE = 6
MAX_DIFF_LINES = 40
INDENT = 2


def diagnosis_report(diagnosis: Diagnosis) -> RenderableType:
    """Verdict, findings worst first, the repair as a diff, and what the map costs beside our plan."""
    parts: list[RenderableType] = [_headline(diagnosis)]
    for finding in diagnosis.findings:
        parts += [Text(), *_finding(finding)]
    if diagnosis.repair is not None:
        parts += [Text(), *_repair(diagnosis.repair, diagnosis.diff)]
    if diagnosis.given is not None:
        parts += [Text(), *_costs(diagnosis.given, diagnosis.ours)]
    parts += [Text(note, style="dim") for note in diagnosis.notes]
    return Group(*parts)


def verdict_style(diagnosis: Diagnosis) -> str:
    """The style of the worst finding; green where there is none."""
    return _STYLES[diagnosis.findings[0].severity] if diagnosis.findings else "bold green"


def _headline(diagnosis: Diagnosis) -> Text:
    return Text.assemble(
        (diagnosis.model, "bold"),
        f" with {diagnosis.origin}: ",
        (diagnosis.verdict, verdict_style(diagnosis)),
        f"\nRan {', '.join(diagnosis.runs)} on virtual GPUs under accelerate's hooks.",
    )


def _finding(finding: Finding) -> Iterator[RenderableType]:
    yield Text.assemble(
        (finding.severity, _STYLES[finding.severity]), f"  {finding.title}  ", (f"[{finding.hazard}]", "dim")
    )
    lines = [Text(finding.place, style="cyan")] if finding.place else []
    shown = [line for line in finding.evidence if line != finding.place]
    lines += [Text(line) for line in shown[:MAX_EVIDENCE]]
    if len(shown) > MAX_EVIDENCE:
        lines.append(Text(f"and {len(shown) - MAX_EVIDENCE} more", style="dim"))
    lines.append(Text.assemble(("fix: ", "bold"), finding.fix))
    yield from map(_indented, lines)


def _repair(repair: Repair, diff: str) -> Iterator[RenderableType]:
    proof = ("proven by a run", "bold green") if repair.proven else ("still not clean", "bold red")
    yield Text.assemble(("Smallest repair", "bold"), f": {repair_summary(repair)} (", proof, ")")
    lines = diff.splitlines()[2:]
    for line in lines[:MAX_DIFF_LINES]:
        yield _indented(Text(line, style=_DIFF_STYLES.get(line[:1], "")))
    if len(lines) > MAX_DIFF_LINES:
        rest = f"and {len(lines) - MAX_DIFF_LINES} lines more: --fix -o FILE writes the whole map"
        yield _indented(Text(rest, style="dim"))


def _indented(line: Text) -> Padding:
    """Moved in, and not filled up with blanks that a pipe would keep."""
    return Padding(line, (0, 0, 0, INDENT), expand=False)


def repair_summary(repair: Repair) -> str:
    """How many modules move, how many bytes, and which."""
    moved = [move.module for move in repair.moves if move.target is not None and move.source is not None]
    added = [move.module for move in repair.moves if move.source is None]
    gone = [move.module for move in repair.moves if move.target is None]
    parts = []
    if moved:
        parts.append(f"move {_shown(moved)}, {format_bytes(repair.moved_bytes)}")
    if added:
        parts.append(f"add {_shown(added)}")
    if gone:
        parts.append(f"drop or rename {_shown(gone)}")
    return "; ".join(parts) or "nothing to change"


def _shown(modules: list[str], most: int = 4) -> str:
    short = short_names(modules)
    return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "")


def _costs(given: MapCosts, ours: MapCosts | None) -> Iterator[RenderableType]:
    yield _bars(given)
    yield Text()
    yield _compared([given, *([ours] if ours is not None else [])])


def _bars(costs: MapCosts) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for load in costs.loads:
        sizes = f" {load.peak.total_bytes / GIB:.2f} of {(load.memory_bytes or 0) / GIB:.2f} GiB"
        bar = memory_bar(load.peak, load.memory_bytes or 1)
        table.add_row(Text(load.device, style="bold"), Text.assemble(bar, sizes))
    return table


def _compared(costs: Sequence[MapCosts]) -> Table:
    """Peaks, idle shares, traffic and room, ours beside the map's."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for one in costs:
        table.add_column(one.title, justify="right", no_wrap=True)
    for index, load in enumerate(costs[0].loads):
        table.add_row(f"{load.device} peak, GiB", *(f"{c.loads[index].peak.total_bytes / GIB:.2f}" for c in costs))
    for index, load in enumerate(costs[0].loads):
        table.add_row(f"{load.device} waits, prefill / decode", *(idle_shares(c.loads[index]) for c in costs))
    table.add_row("copied between GPUs per prompt", *(format_bytes(c.crossing_bytes("prefill")) for c in costs))
    table.add_row("copied between GPUs per token", *(format_bytes(c.crossing_bytes("decode")) for c in costs))
    table.add_row("copies per token", *(f"{_num_copies(one):g}" for one in costs))
    table.add_row("room for KV positions per sequence", *(room(one) for one in costs))
    return table


def idle_shares(load: DeviceLoad) -> str:
    """The shares of one request's time that a GPU waits, in prefill and decode."""
    shares = (load.idle_prefill, load.idle_decode)
    return " / ".join("-" if share is None else f"{share:.0%}" for share in shares)


def room(costs: MapCosts) -> str:
    """KV positions per sequence that fit."""
    return "no cache" if costs.kv_positions is None else f"{max(0, costs.kv_positions):,}"


def _num_copies(costs: MapCosts) -> float:
    return sum(crossing.num_copies for crossing in costs.crossings if crossing.phase == "decode")
