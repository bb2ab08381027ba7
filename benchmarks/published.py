"""Published memory and speed beside what is predicted for the code that they were measured with.

    python -m benchmarks.published            writes docs/published.md
    python -m benchmarks.published --check    only says whether the predictions are as good as the file claims

A published "GPU memory" without a meter is read as what the card shows in use: tensors, what torch's allocator and
cuBLAS keep, and a CUDA context on every GPU. A table in GB is read in GiB when one of its rows would be impossible
otherwise: less than its weights, cache and context.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median

from benchmarks.published_rows import MemoryRow, SpeedRow, memory_rows, speed_rows
from planner.errors import InfeasibleError
from planner.implementation import IMPLEMENTATIONS
from planner.machine import Machine
from planner.plan import Plan
from planner.units import GIB
from planner.workload import Workload
from runtime.costs import trace_costs
from vlm.cost_library import CostLibrary
from vlm.model import find_model
from vlm.planning import plan_for
from vlm.traced import TracedModel

TABLE = Path(__file__).parents[1] / "docs" / "published.md"
GB = 10**9
MEDIAN_ERROR = 0.05
MOST_UNDER = 0.05
"""What the predictions are held to: the median of errors either way, and the largest shortfall of any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A row of memory, what its card is predicted to show in use, and the least that could be; None where it does not
    fit, or where nothing is predicted."""

    row: MemoryRow
    used_bytes: int | None
    least_bytes: int
    unit: int = GB

    @property
    def error(self) -> float | None:
        """Predicted over published, less one."""
        if self.used_bytes is None or self.row.published is None:
            return None
        return self.used_bytes / (self.row.published * self.unit) - 1

    @property
    def shortfall(self) -> float:
        """By what share the prediction is below the least that the published figure may have been rounded from."""
        if self.used_bytes is None or self.row.published is None:
            return 0.0
        return max(0.0, 1 - self.used_bytes / ((self.row.published - self.row.step / 2) * self.unit))

    @property
    def is_scored(self) -> bool:
        """Whether the row says enough, and does not contradict its own table."""
        return not self.row.unscored and self.row.published is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A row of speed, and the predicted tokens per second."""

    row: SpeedRow
    tokens_per_s: float


def plan_of(row: MemoryRow | SpeedRow, costs: CostLibrary) -> Plan:
    """The plan of what a row ran; InfeasibleError where it does not fit."""
    model = find_model(row.model, costs.find)
    if row.config:
        assert isinstance(model, TracedModel), f"{row.model} cannot be given another config"
        model = replace(model, config={**model.config, **row.config})
    asked = {"num_images": 1 if model.has_images else 0, **row.workload}
    workload = Workload(**asked, implementation=row.implementation)
    return plan_for(model, Machine.parse(row.gpus), workload)


def predicted(row: MemoryRow, costs: CostLibrary) -> Predicted:
    """What a row's cards show in use together."""
    if not row.model:
        return Predicted(row=row, used_bytes=None, least_bytes=0)
    try:
        plan = plan_of(row, costs)
    except InfeasibleError:
        return Predicted(row=row, used_bytes=None, least_bytes=0)
    peaks = list(plan.memory.values())
    return Predicted(
        row=row,
        used_bytes=sum(peak.total_bytes - peak.reserve_bytes for peak in peaks if peak.total_bytes),
        least_bytes=sum(peak.weights_bytes + peak.kv_cache_bytes + peak.context_bytes for peak in peaks),
    )


def in_their_unit(found: Sequence[Predicted]) -> Iterator[Predicted]:
    """The rows of a table in GB, or in GiB where a row would be impossible in GB."""
    impossible = any(one.row.published and one.row.published * GB < one.least_bytes for one in found)
    yield from (replace(one, unit=one.row.unit or (GIB if impossible else GB)) for one in found)


def timed(row: SpeedRow, costs: CostLibrary) -> Timed:
    """The tokens per second of a row, of the whole answer or of its decode steps."""
    plan = plan_of(row, costs)
    estimate, workload = plan.estimate, plan.workload
    assert estimate.ttft_s is not None and estimate.tpot_s is not None, "named GPUs have a speed"
    seconds = workload.new_tokens * estimate.tpot_s + (0.0 if row.decode_only else estimate.ttft_s)
    return Timed(row=row, tokens_per_s=workload.batch_size * workload.new_tokens / seconds)


def complaints(memory: Sequence[Predicted], speed: Sequence[Timed]) -> Iterator[str]:
    """Where the predictions are worse than they are held to be."""
    scored = [(one, one.error) for one in memory if one.is_scored]
    for one, error in scored:
        if error is None:
            yield f"{one.row.table}, {one.row.what}: runs, and was predicted not to fit"
    errors = [(one, error) for one, error in scored if error is not None]
    middle = median(abs(error) for _, error in errors)
    if middle > MEDIAN_ERROR:
        yield f"the median error is {middle:.1%}"
    for one, _ in errors:
        if one.shortfall > MOST_UNDER:
            yield f"{one.row.table}, {one.row.what}: {one.shortfall:.1%} under"
    for one in memory:
        if one.row.model and one.row.published is None and one.used_bytes is not None:
            yield f"{one.row.table}, {one.row.what}: ran out of memory, and was predicted to fit"
    yield from _wrong_order(speed)


def _wrong_order(speed: Sequence[Timed]) -> Iterator[str]:
    """Rows of a table that differ in precision alone, and whose order is predicted the other way round."""
    for _, rows in groupby(speed, key=lambda one: (one.row.table, one.row.what.partition(",")[2])):
        plain, *others = rows
        for one in others:
            if (one.row.published > plain.row.published) != (one.tokens_per_s > plain.tokens_per_s):
                yield f"{one.row.table}, {one.row.what}: on the wrong side of {plain.row.what}"


def page(memory: Sequence[Predicted], speed: Sequence[Timed]) -> str:
    """docs/published.md."""
    scored = [one for one in memory if one.is_scored]
    errors = [one.error for one in scored if one.error is not None]
    lines = [
        "# Published figures",
        "",
        "Written by `python -m benchmarks.published`. Predictions are for the code that the figures were measured",
        "with; what it does differently from ours is switched by `--implementation`, and said below.",
        "",
        f"Memory: {len(errors)} rows are scored. The median error is {median(map(abs, errors)):.1%}, the largest",
        f"excess {max(errors):.1%}. The largest shortfall is {-min(errors):.1%}, and "
        f"{max(one.shortfall for one in scored):.1%} of what a figure may have been rounded from.",
        "",
        "A figure without a meter is read as what the card shows in use: tensors, workspace, and a CUDA context on",
        "every GPU. A table in GB is read in GiB when one of its rows would be impossible otherwise. Rows that",
        "contradict their own table, or say too little, are shown with the reason and not scored.",
        *_memory_tables(memory),
        *_speed_tables(speed),
        *_implementations(memory, speed),
    ]
    return "\n".join(lines) + "\n"


def _memory_tables(memory: Sequence[Predicted]) -> Iterator[str]:
    for table, rows in groupby(memory, key=lambda one: one.row.table):
        yield from ("", f"## {table}", "", "| | published | predicted | error | |", "|---|---:|---:|---:|---|")
        yield from map(_memory_line, rows)


def _memory_line(one: Predicted) -> str:
    unit = "GiB" if one.unit == GIB else "GB"
    published = "out of memory" if one.row.published is None else f"{one.row.published:g} {unit}"
    fits = "does not fit" if one.row.model else ""
    found = fits if one.used_bytes is None else f"{one.used_bytes / one.unit:.2f} {unit}"
    error = "" if one.error is None else f"{one.error:+.1%}"
    return f"| {one.row.what} | {published} | {found} | {error} | {one.row.unscored or one.row.note} |"


def _speed_tables(speed: Sequence[Timed]) -> Iterator[str]:
    yield from ("", "# Tokens per second", "")
    yield "Of the whole batch. The order of precisions is held to the published one; ratios are shown as they are. An"
    yield "engine is predicted without any time for launches, which is the most that it could reach."
    for table, rows in groupby(speed, key=lambda one: one.row.table):
        yield from ("", f"## {table}", "", "| | published | predicted | ratio | |", "|---|---:|---:|---:|---|")
        for one in rows:
            ratio = one.tokens_per_s / one.row.published
            yield f"| {one.row.what} | {one.row.published:g} | {one.tokens_per_s:.1f} | {ratio:.2f} | {one.row.note} |"


def _implementations(memory: Sequence[Predicted], speed: Sequence[Timed]) -> Iterator[str]:
    run = [*(one.row for one in memory if one.row.model), *(one.row for one in speed)]
    used = dict.fromkeys(row.implementation for row in run)
    yield from ("", "# Implementations", "", "| `--implementation` | habits | known from |", "|---|---|---|")
    for name in used:
        yield f"| {name} | {IMPLEMENTATIONS[name].habits} | {IMPLEMENTATIONS[name].source} |"


def main(argv: Iterable[str] | None = None) -> int:
    """Predict all rows, write the page, and say where the predictions are not good enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--cache", type=Path, help="keeps traces of models whose costs do not ship")
    arguments = parser.parse_args(None if argv is None else list(argv))
    costs = CostLibrary(arguments.cache, trace_costs, extrapolating=True)
    rows = [predicted(row, costs) for row in memory_rows()]
    memory = [one for _, table in groupby(rows, key=lambda one: one.row.table) for one in in_their_unit(list(table))]
    speed = [timed(row, costs) for row in speed_rows()]
    if not arguments.check:
        TABLE.write_text(page(memory, speed), encoding="utf-8")
    found = list(complaints(memory, speed))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
