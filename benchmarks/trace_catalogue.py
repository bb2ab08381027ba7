"""Costs of the catalogue's models for any workload, fitted to traces at full size, and checked on held-out ones.

    python benchmarks/trace_catalogue.py              trace all; writes vlm/graphs/*.json.gz
    python benchmarks/trace_catalogue.py llava qwen2  trace those whose names contain one of these
    python benchmarks/trace_catalogue.py --kind images   trace these kinds of workload alone, and keep the others
    python benchmarks/trace_catalogue.py --check      compare files with fresh traces; of all, writes docs/costs.md

Batch, number and size of images and length of text vary, as far as one set of polynomials holds for all: the peak of
every device at two held-out workloads must be met within one percent and not undercut, whether the model lies on
one, two or three devices. Where it does not hold, fewer counts vary.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from transformers import PreTrainedModel

from planner.errors import UnsupportedModelError
from planner.fit import UnlikeSamplesError, fit
from planner.graph import ModuleGraph
from planner.machine import Machine
from planner.memory import CostTable
from planner.polynomial import Quantities
from planner.workload import Workload
from runtime.costs import costs_of, sample_at, windows
from runtime.rehearsal import pictures_of
from vlm.catalogue import catalogue_names
from vlm.cost_library import read_shipped, variant, write_shipped
from vlm.inputs import Pictures
from vlm.model import find_model
from vlm.skeleton import build_skeleton
from vlm.traced import TracedCosts, TracedModel
from vlm.versions import installed_versions

TABLE = Path(__file__).parents[1] / "docs" / "costs.md"
TOLERANCE = 0.01
ROUNDING_BYTES = 512 * 256
"""What a plan leaves to its workspace: allocators round tensors up to 512 bytes."""
TEXTS = (16, 1024, 4096)
IMAGES = (1, 2, 3)
SIZES = (None, (896, 672), (1344, 896))
TILED_SIZES = (None, (1120, 560), (2240, 3360))
"""From one tile to the 24 of XComposer2.5; 4KHD makes 18 of the second and 24 or 25 of the others."""
MOST_PATCHES = 8192
"""Of a picture of which several are traced: how many positions they take is asked of a small twin, on real values."""
HELD_OUT_TEXTS = (300, 2900)
HELD_OUT_SIZE = (1120, 560)
TILED_HELD_OUT_SIZE = (1344, 896)
BATCHES = {1: (1,), 2: (2, 4)}
"""Batches traced for a single sequence and for an uneven batch; the latter is checked at 3."""
DEVICE = Machine.parse("10000GiB").devices[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Which counts vary beside the length of text, whose samples are `texts` on each side of a bend."""

    texts: Sequence[Sequence[int]] = (TEXTS,)
    images: Sequence[int] = (1,)
    sizes: Sequence[tuple[int, int] | None] = (None,)
    held_out_size: tuple[int, int] | None = None

    def workloads(self, base: Workload, batches: Sequence[int]) -> list[Workload]:
        """The fewest that determine polynomials of degree 2, a corner of the grid in every batch, and its far end."""
        counts = [
            (text, images, size)
            for texts in self.texts
            for (i, text), (j, images), (k, size) in product(*map(enumerate, (texts, self.images, self.sizes)))
            if i + j + k <= 2
        ]
        counts.append((self.texts[-1][-1], self.images[-1], self.sizes[-1]))
        return [
            replace(
                base,
                batch_size=batch,
                prompt_tokens=text,
                num_images=images if base.num_images else 0,
                image_size=size,
            )
            for batch in batches
            for text, images, size in dict.fromkeys(counts)
        ]

    def held_out(self, base: Workload, batches: Sequence[int]) -> list[Workload]:
        """Two workloads that the costs were not fitted to."""
        batch = sum(batches) // len(batches)
        images = (self.images[-1], self.images[0]) if base.num_images else (0, 0)
        return [
            replace(base, batch_size=batch, prompt_tokens=text, num_images=count, image_size=self.held_out_size)
            for text, count in zip(HELD_OUT_TEXTS, images, strict=True)
        ]


def traced_models(names: Sequence[str]) -> Iterator[TracedModel]:
    """The catalogue's models whose costs come from traces, by file."""
    for stem in dict.fromkeys(catalogue_names().values()):
        if not names or any(name in stem for name in names):
            model = find_model(stem)
            if isinstance(model, TracedModel) and model.catalogue_stem == stem:  # others share these costs
                yield model


def base_workloads(model: TracedModel) -> Iterator[tuple[Workload, Sequence[int]]]:
    """Each kind of workload, and its batches."""
    for images in (1, 0) if model.has_images else (0,):
        for batches in BATCHES.values():
            dtype = model.default_dtype
            yield Workload(num_images=images, batch_size=batches[0], dtype=dtype, kv_dtype=dtype), batches


def widest_costs(
    model: TracedModel, skeleton: PreTrainedModel, base: Workload, batches: Sequence[int]
) -> TracedCosts | None:
    """The costs that let most counts vary and stand the check; None when not even the length of text may vary.

    Raises: whatever tracing raises.
    """
    window = min(windows(skeleton.config), default=None)
    for axes in _axes(base, pictures_of(skeleton, base), window):
        workloads = axes.workloads(base, batches)
        start = time.perf_counter()
        try:
            costs = costs_of(skeleton, model.name, workloads)
            excess = checked(costs, skeleton, axes.held_out(base, batches))
        except (UnsupportedModelError, UnlikeSamplesError, Misfit) as problem:
            print(f"    not {axes}: {problem}", flush=True)
            continue
        seconds = time.perf_counter() - start
        print(f"    {variant(base)}: {len(workloads)} runs, {seconds:.0f} s, {excess:+.2%}", flush=True)
        return costs
    print(f"    {variant(base)}: nothing stands the check, to be traced when asked for", flush=True)
    return None


def _axes(base: Workload, pictures: Pictures, window: int | None) -> Iterator[Axes]:
    """What may vary, most first."""
    texts: tuple[tuple[int, ...], ...] = (TEXTS,)
    if window is not None and window <= TEXTS[-1]:
        bend = window - IMAGES[-1] * pictures.image_tokens
        longest = max(TEXTS[-1], window + window // 4)
        texts = ((TEXTS[0], bend // 2, bend), (window, (window + longest) // 2, longest))
    several = base.num_images and pictures.patches <= MOST_PATCHES
    is_tiled = "image_tiles" in pictures.pixels
    sizes = TILED_SIZES if is_tiled else SIZES
    held_out = TILED_HELD_OUT_SIZE if is_tiled else HELD_OUT_SIZE
    if several and pictures.any_size:
        yield Axes(texts=texts, images=IMAGES, sizes=sizes, held_out_size=held_out)
    if several:
        yield Axes(texts=texts, images=IMAGES)
    if pictures.any_size and base.num_images:
        yield Axes(texts=texts, sizes=sizes, held_out_size=held_out)
    yield Axes(texts=texts)


class Misfit(Exception):
    """Costs that a fresh trace contradicts."""


def checked(costs: TracedCosts, skeleton: PreTrainedModel, workloads: Sequence[Workload]) -> float:
    """The largest excess of a predicted peak over that of a trace, as a fraction.

    Raises: Misfit when a peak is undercut or exceeded by more than `TOLERANCE`, or a whole number differs.
    """
    worst = 0.0
    for workload in workloads:
        sample = sample_at(skeleton, costs.graph.name, workload)
        fresh = _without_moments(fit([sample]))
        rule = costs.image.counts(workload.image_size, workload.num_images) if costs.image else (0, 0)
        expected = (sample.quantities.patches, sample.quantities.image_tokens)
        if rule is None or tuple(workload.num_images * count for count in rule) != expected:
            raise Misfit(f"images amount to {expected}, the rule says {rule} each")
        for name in ("num_parameters", "weight_bytes", "kv_bytes_per_position"):
            if getattr(fresh, name) != getattr(costs.graph, name):
                raise Misfit(f"{name} is {getattr(fresh, name)}, on file {getattr(costs.graph, name)}")
        for parts in (1, 2, 3):
            worst = max(worst, *_excesses(costs.graph, fresh, sample.quantities, parts))
    return worst


def _excesses(graph: ModuleGraph, fresh: ModuleGraph, quantities: Quantities, parts: int) -> Iterator[float]:
    """By how much the costs exceed a trace's, for each device of a model in so many equal parts."""
    tables = CostTable.of(graph, quantities), CostTable.of(fresh, quantities)
    count = len(graph.groups)
    for part in range(parts):
        members = range(part * count // parts, (part + 1) * count // parts)
        predicted, traced = (table.on_device(members, DEVICE).total_bytes for table in tables)
        excess = (predicted - traced) / traced
        if predicted + ROUNDING_BYTES < traced or excess > TOLERANCE:
            raise Misfit(f"part {part + 1} of {parts} at {quantities}: {predicted} bytes for {traced} ({excess:+.2%})")
        yield excess


def _without_moments(graph: ModuleGraph) -> ModuleGraph:
    """The graph of one run, held to what that run showed: its moments allow for longer caches."""
    groups = (replace(g, decode=replace(g.decode, moments_bytes=())) if g.decode else g for g in graph)
    return replace(graph, groups=tuple(groups))


def check_shipped(model: TracedModel) -> dict[str, float]:
    """By variant that ships, the largest excess over fresh traces. Raises: Misfit."""
    shipped = read_shipped(model.catalogue_stem or "")
    skeleton = _skeleton(model)
    excess = {}
    for base, batches in base_workloads(model):
        costs = shipped.get(variant(base))
        if costs is None:
            continue
        varied = {one.variable for one in costs.graph.valid if one.low < one.high}
        any_size = costs.image is not None and costs.image.cell_px is not None
        axes = Axes(images=IMAGES if "images" in varied else (1,), sizes=SIZES if any_size else (None,))
        excess[variant(base)] = checked(costs, skeleton, axes.held_out(base, batches))
    return excess


def _skeleton(model: TracedModel) -> PreTrainedModel:
    return build_skeleton(model, dtype=getattr(torch, model.default_dtype))


def main() -> int:
    """Trace or check what was asked for; 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--kind", default="", help="what the names of the kinds to trace begin with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return _check(arguments.names) if arguments.check else _trace(arguments.names, arguments.kind)


def _trace(names: Sequence[str], kind: str) -> int:
    for model in traced_models(names):
        wanted = [(base, batches) for base, batches in base_workloads(model) if variant(base).startswith(kind)]
        if wanted:
            print(model.name, flush=True)
            skeleton = _skeleton(model)
            stem = model.catalogue_stem or ""
            found = {variant(base): widest_costs(model, skeleton, base, batches) for base, batches in wanted}
            kept = dict(read_shipped(stem)) | found
            order = [variant(base) for base, _ in base_workloads(model)]
            write_shipped(stem, {name: costs for name in order if (costs := kept.get(name))})
    return 0


def _check(names: Sequence[str]) -> int:
    rows, failed = [], 0
    for model in traced_models(names):
        try:
            rows += [_row(model, name, excess) for name, excess in check_shipped(model).items()]
            print(*(row for row in rows if f"| {model.name} |" in row), sep="\n", flush=True)
        except Misfit as problem:
            failed += 1
            print(f"{model.name}: {problem}", flush=True)
    if not names and not failed:
        TABLE.write_text(_table(rows), encoding="utf-8")
    return 1 if failed else 0


def _row(model: TracedModel, kind: str, excess: float) -> str:
    valid = read_shipped(model.catalogue_stem or "")[kind].graph.valid
    ranges = ", ".join(f"{one.variable} {one.low} to {one.high}" for one in valid if one.low < one.high)
    return f"| {' | '.join((model.name, kind, ranges, f'{excess:+.2%}'))} |"


def _table(rows: Sequence[str]) -> str:
    head = ("model", "kind of workload", "traced from and to", "largest excess")
    return "\n".join(
        [
            "# Costs on file",
            "",
            "Written by `python benchmarks/trace_catalogue.py --check`. Each row is one set of polynomials in",
            "`vlm/graphs/`. The last column is by how much the peak of a device exceeds that of a fresh trace at two",
            "workloads that the polynomials were not fitted to, on one, two and three devices; none is",
            f"below by more than the {ROUNDING_BYTES // 1024} KiB that a plan leaves to its workspace.",
            "",
            f"Traced with {installed_versions()}.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
