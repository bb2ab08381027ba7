"""A map as one SVG: devices as columns, modules as blocks in proportion to their bytes, memory by part, copies below.

All columns share one scale, so heights compare. Colours are classes; the page's style says what they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from planner.diagnosis.diagnosis import Block, Crossing, DeviceLoad, MapCosts
from planner.graph import Phase
from planner.memory import LABELS
from planner.units import GIB, format_bytes

PAGE_PX, GAP_PX, PARTS_PX = 1100, 30, 44
NARROWEST_PX, WIDEST_PX = 150, 290
"""Of a column: below, names no longer fit; above, few columns look lost."""

TOP_PX, STACK_PX = 50, 380
LANE_PX, LANES_TOP_PX = 34, 26
LABEL_PX = 15
"""Least height of a block that still holds its name."""

SMALLEST_PX = 1.5
CHARACTER_PX = 6.7
"""Width of a character of the 11-pixel label face, about."""

HUES = 6
"""Classes `hue0` to `hue5` for the model's parts."""

PASSES: Mapping[Phase, str] = {"encode": "image pass", "prefill": "prompt", "decode": "token"}
"""What one pass of each phase is for."""

_ELEMENT = re.compile(r"(.*)\.(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Neighbouring elements of one module list on one device, or a module by itself."""

    name: str
    part: str
    num_bytes: int
    count: int
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where columns are, how wide, and how many pixels a byte is high."""

    left_px: Mapping[str, float]
    column_px: float
    px_per_byte: float

    @classmethod
    def of(cls, loads: Sequence[DeviceLoad]) -> _Layout:
        """Columns side by side; the fullest fills four fifths of the height, and what is free beyond is cut off."""
        width = min(WIDEST_PX, max(NARROWEST_PX, PAGE_PX / len(loads) - GAP_PX))
        fullest = max(load.peak.total_bytes for load in loads)
        largest = max(load.memory_bytes or 0 for load in loads)
        shown = max(min(1.25 * fullest, largest), fullest, 1)
        left = {load.device: GAP_PX / 2 + index * (width + GAP_PX) for index, load in enumerate(loads)}
        return cls(left_px=left, column_px=width, px_per_byte=STACK_PX / shown)


def picture(costs: MapCosts) -> str:
    """The SVG element; its text is selectable and every block has a tooltip."""
    layout, hues = _Layout.of(costs.loads), _hues(costs.blocks)
    width = len(costs.loads) * (layout.column_px + GAP_PX)
    arrows = _arrows(costs.crossings, layout, width)
    height = TOP_PX + STACK_PX + LANES_TOP_PX + LANE_PX * (1 + max((a.row for a in arrows), default=-1)) + 8
    parts: list[str] = []
    for load in costs.loads:
        on_device = [block for block in costs.blocks if block.device == load.device]
        parts += _column(load, on_device, layout, hues)
    parts += [*map(_line, arrows), *map(_carried, arrows)]
    described = "; ".join(f"{load.device} {format_bytes(load.peak.total_bytes)}" for load in costs.loads)
    return (
        f'<svg class="picture" viewBox="0 0 {width:g} {height:g}" style="min-width:{min(width, 640):g}px;'
        f'max-width:{width:g}px" role="img" aria-label="{escape(costs.title)}: {escape(described)}">'
        '<defs><pattern id="hatch" width="7" height="7" patternTransform="rotate(45)" patternUnits="userSpaceOnUse">'
        '<rect class="hatch" width="3" height="7"/></pattern><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
        'markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path class="tip" '
        'd="M0,0 L8,4 L0,8 z"/></marker></defs>' + "".join(parts) + "</svg>"
    )


def _hues(blocks: Sequence[Block]) -> dict[str, int]:
    """A colour for each part of the model, in the model's order."""
    parts = list(dict.fromkeys(_part(block.module) for block in blocks))
    return {part: index % HUES for index, part in enumerate(parts)}


def _part(module: str) -> str:
    """What of the model a module belongs to: its module list, or the container around it."""
    match = _ELEMENT.search(module)
    return re.split(r"\.\d+(\.|$)", module)[0] if match else module.rpartition(".")[0] or module


def _runs(blocks: Sequence[Block]) -> Iterator[_Run]:
    """Blocks in order, neighbours of one list joined where both failed or neither did."""
    pending: list[Block] = []
    for block in blocks:
        if pending and not _joins(pending[-1], block):
            yield _joined(pending)
            pending = []
        pending.append(block)
    if pending:
        yield _joined(pending)


def _joins(before: Block, after: Block) -> bool:
    first, second = _ELEMENT.fullmatch(before.module), _ELEMENT.fullmatch(after.module)
    if first is None or second is None or before.failed != after.failed:
        return False
    return first[1] == second[1] and int(second[2]) == int(first[2]) + 1


def _joined(blocks: Sequence[Block]) -> _Run:
    name = blocks[0].module
    if len(blocks) > 1:
        name += "-" + blocks[-1].module.rpartition(".")[2]
    return _Run(
        name=name,
        part=_part(blocks[0].module),
        num_bytes=sum(block.num_bytes for block in blocks),
        count=len(blocks),
        failed=blocks[0].failed,
    )


def _column(load: DeviceLoad, blocks: Sequence[Block], layout: _Layout, hues: Mapping[str, int]) -> Iterator[str]:
    left, scale = layout.left_px[load.device], layout.px_per_byte
    capacity = load.memory_bytes or load.peak.total_bytes
    over = load.peak.total_bytes > capacity
    yield f'<text class="device" x="{left:g}" y="18">{escape(load.device)}</text>'
    amount = f"{load.peak.total_bytes / GIB:.2f} of {capacity / GIB:.2f} GiB"
    yield f'<text class="amount{" bad" if over else ""}" x="{left:g}" y="36">{amount}</text>'
    frame = min(max(capacity * scale, 2), STACK_PX)
    yield f'<rect class="frame" x="{left:g}" y="{TOP_PX}" width="{layout.column_px:g}" height="{frame:.1f}" rx="4"/>'
    y = float(TOP_PX)
    for run in _runs(blocks):
        yield from _block(run, left, y, layout, hues[run.part])
        y += run.num_bytes * scale
    yield from _parts(load, left + layout.column_px - PARTS_PX, scale)
    peak, bottom = TOP_PX + load.peak.total_bytes * scale, TOP_PX + frame
    if over:
        ends = f'x1="{left - 6:g}" x2="{left + layout.column_px + 6:g}"'
        yield f'<line class="limit" {ends} y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
    elif bottom - peak > LABEL_PX:
        free = f"{(capacity - load.peak.total_bytes) / GIB:.2f} GiB free"
        middle = left + layout.column_px / 2
        yield f'<text class="free" x="{middle:g}" y="{(peak + bottom) / 2 + 4:.1f}">{free}</text>'


def _block(run: _Run, left: float, top: float, layout: _Layout, hue: int) -> Iterator[str]:
    width = layout.column_px - PARTS_PX - 2
    height = run.num_bytes * layout.px_per_byte
    shown = max(height - 1, SMALLEST_PX)
    box = f'x="{left:g}" y="{top:.1f}" width="{width:g}" height="{shown:.1f}" rx="2"'
    yield f"<g><title>{escape(run.name)}: {format_bytes(run.num_bytes)}</title>"
    yield f'<rect class="block hue{hue}" {box}/>'
    if run.count > 1 and height / run.count > 4:
        for index in range(1, run.count):
            y = top + height * index / run.count
            yield f'<line class="element" x1="{left:g}" x2="{left + width:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if run.failed:
        yield f'<rect class="failed" {box}/>'
    if shown >= LABEL_PX:
        name = _fitting(run.name, width - 10)
        yield f'<text class="name" x="{left + 6:g}" y="{top + shown / 2 + 4:.1f}">{name}</text>'
    yield "</g>"


def _fitting(name: str, width_px: float) -> str:
    """As many of a name's last segments as fit, as those tell modules apart; at least the end of the last."""
    most = int(width_px / CHARACTER_PX)
    while len(name) > most and re.search(r"\.[^.\d]", name):
        name = name.partition(".")[2]
    return escape(name if len(name) <= most else f"…{name[-most + 1 :]}")


def _parts(load: DeviceLoad, left: float, scale: float) -> Iterator[str]:
    y = float(TOP_PX)
    for part, num_bytes in load.peak.parts.items():
        height = num_bytes * scale
        if height > 0:
            yield (
                f'<g><title>{LABELS[part]}: {format_bytes(num_bytes)}</title><rect class="part {part}" x="{left:g}" '
                f'y="{y:.1f}" width="{PARTS_PX}" height="{max(height - 0.5, 0.3):.1f}"/></g>'
            )
        y += height


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrow:
    """All that crosses from one device to another: from `start` to `end`, its level part in `row`, text at `middle`."""

    start: float
    end: float
    row: int
    middle: float
    label: str
    per_token_bytes: int

    @property
    def y(self) -> float:
        """Height of the level part."""
        return TOP_PX + STACK_PX + LANES_TOP_PX + LANE_PX * self.row


def _arrows(crossings: Sequence[Crossing], layout: _Layout, width: float) -> list[_Arrow]:
    """Short arrows highest, each in the first row where neither it nor its text meets another.

    All leave right of a column's middle and arrive left of it, so that two directions do not lie on one another.
    """
    pairs: dict[tuple[str, str], list[Crossing]] = {}
    for crossing in crossings:
        if {crossing.source, crossing.target} <= layout.left_px.keys():
            pairs.setdefault((crossing.source, crossing.target), []).append(crossing)
    rows: list[list[tuple[float, float]]] = []
    arrows = []
    columns = list(layout.left_px)
    for source, target in sorted(pairs, key=lambda pair: abs(columns.index(pair[0]) - columns.index(pair[1]))):
        label = f"{_short(source)} → {_short(target)}: {_amounts(pairs[source, target])}"
        start = layout.left_px[source] + layout.column_px * 0.58
        end = layout.left_px[target] + layout.column_px * 0.42
        half = len(label) * CHARACTER_PX / 2 + 6
        middle = min(max((start + end) / 2, half), width - half)
        extent = min(start, end, middle - half), max(start, end, middle + half)
        row = next((i for i, taken in enumerate(rows) if not any(_overlap(extent, t) for t in taken)), len(rows))
        rows += [[]] if row == len(rows) else []
        rows[row].append(extent)
        per_token = sum(crossing.num_bytes for crossing in pairs[source, target] if crossing.phase == "decode")
        arrows.append(_Arrow(start=start, end=end, row=row, middle=middle, label=label, per_token_bytes=per_token))
    return arrows


def _amounts(crossings: Sequence[Crossing]) -> str:
    sums: dict[Phase, int] = {}
    for crossing in crossings:
        sums[crossing.phase] = sums.get(crossing.phase, 0) + crossing.num_bytes
    return ", ".join(f"{format_bytes(num_bytes)} per {PASSES[phase]}" for phase, num_bytes in sums.items())


def _short(device: str) -> str:
    """The column above says that it is a GPU."""
    return device.removeprefix("cuda:")


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _line(arrow: _Arrow) -> str:
    """From under one column to under the other, thicker the more it carries per token."""
    thickness = 1 + 0.35 * max(0.0, math.log2(max(arrow.per_token_bytes, 1) / 1024))
    bottom = TOP_PX + STACK_PX + 6
    return (
        f'<g><title>{escape(arrow.label)}</title><path class="flow" d="M{arrow.start:g},{bottom} V{arrow.y:g} '
        f'H{arrow.end:g} V{bottom + 2}" stroke-width="{thickness:.1f}"/></g>'
    )


def _carried(arrow: _Arrow) -> str:
    return f'<text class="carried" x="{arrow.middle:g}" y="{arrow.y + 15:g}">{escape(arrow.label)}</text>'
