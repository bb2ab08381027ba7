"""Traces a model at a few sizes and fits costs to them, so that one graph answers any length of prompt and answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from planner.fit import Sample, fit
from planner.polynomial import Quantities
from planner.workload import Workload
from runtime.planning import fingerprint, refuse_hazards
from runtime.rehearsal import pictures_of, prompt_of_pictures
from runtime.steps import forward_and_decode
from runtime.ties import ties_apart
from runtime.trace import Trace, trace_model
from runtime.traced_graph import sample_of
from vlm.image_formats import levels
from vlm.image_rule import ImageRule
from vlm.inputs import Pictures
from vlm.internlm_xcomposer2_hd.tiling import Tiling
from vlm.skeleton import build_skeleton
from vlm.traced import TracedCosts, TracedModel, traced_tokens
from vlm.versions import installed_versions

NUM_DECODE_STEPS = 2
SHORT_TEXT_TOKENS = 16
FRACTIONS = (4, 1)
"""Prompts of these parts of the longest one are traced, beside a very short one and the workload's own."""


def trace_costs(model: TracedModel, workload: Workload) -> TracedCosts:
    """The costs of `model` for a workload's batch, images, attention and dtype, and any length of text.

    Raises: UnsupportedModelError when the model cannot be built or run, or leaves tensors on the host.
    """
    skeleton = build_skeleton(model, dtype=getattr(torch, workload.dtype), attention=workload.attention)
    pictures = pictures_of(skeleton, workload)
    longest = traced_tokens(workload)
    limit = _max_positions(skeleton.config)
    if limit is not None:
        longest = min(longest, limit - pictures.image_tokens - NUM_DECODE_STEPS)
    bends = (window - pictures.image_tokens for window in windows(skeleton.config))
    texts = {SHORT_TEXT_TOKENS, workload.prompt_tokens, *(longest // part for part in FRACTIONS)}
    texts |= set(bends)
    # Pictures may leave no room for other texts, or take more than the model was made for.
    traced = sorted(
        count for count in texts if count == workload.prompt_tokens or SHORT_TEXT_TOKENS <= count <= longest
    )
    return costs_of(skeleton, model.name, [replace(workload, prompt_tokens=count) for count in traced])


def _max_positions(config: PreTrainedConfig) -> int | None:
    """The context that a model was made for; some have no table of positions beyond it."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def windows(config: PreTrainedConfig) -> set[int]:
    """Lengths at which the costs of attention bend: sliding windows and chunks."""
    names = ("sliding_window", "attention_chunk_size")
    found = (getattr(level, name, None) for level in levels(config) for name in names)
    return {length for length in found if isinstance(length, int)}


def costs_of(skeleton: PreTrainedModel, name: str, workloads: Sequence[Workload]) -> TracedCosts:
    """The costs fitted to runs of these workloads, which differ in sizes only.

    Raises: UnsupportedModelError as above; UnlikeSamplesError when the model takes different ways for them.
    """
    shown = {_sight(workload): pictures_of(skeleton, workload) for workload in workloads}
    pictures = [shown[_sight(workload)] for workload in workloads]
    with ties_apart(skeleton, wanted=workloads[0].replicate_tied):
        samples = list(_samples(skeleton, name, list(zip(workloads, pictures, strict=True))))
    return TracedCosts(
        graph=fit(samples, min(windows(skeleton.config), default=None)),
        image=_image_rule(workloads, pictures) if workloads[0].num_images else None,
        fingerprint=fingerprint(skeleton),
        max_positions=_max_positions(skeleton.config),
        versions=installed_versions(),
    )


def sample_at(skeleton: PreTrainedModel, name: str, workload: Workload) -> Sample:
    """One run of a workload, with the groups that it alone demands."""
    return next(_samples(skeleton, name, [(workload, pictures_of(skeleton, workload))]))


def _sight(workload: Workload) -> tuple[Any, ...]:
    """What a workload's pictures depend on."""
    return workload.batch_size, workload.num_images, workload.image_size


def _samples(skeleton: PreTrainedModel, name: str, runs: Sequence[tuple[Workload, Pictures]]) -> Iterator[Sample]:
    """One sample per run, all with the groups that the runs together demand."""
    traces: list[Trace] = []
    while not traces or any(trace.groups != traces[-1].groups for trace in traces):
        groups = traces[-1].groups if traces else None
        traces = []
        for workload, pictures in runs:
            inputs = prompt_of_pictures(pictures, workload, skeleton.dtype)
            trace = trace_model(skeleton, inputs, forward_and_decode(NUM_DECODE_STEPS), groups)
            refuse_hazards(trace, name)
            traces.append(trace)
            groups = trace.groups
    for (workload, pictures), trace in zip(runs, traces, strict=True):
        yield sample_of(trace, skeleton, name, _quantities(workload, pictures))


def _quantities(workload: Workload, pictures: Pictures) -> Quantities:
    """What a run amounted to; `positions` is the cache's length in its last decode step."""
    return Quantities(
        batch=workload.batch_size,
        images=workload.num_images,
        patches=pictures.patches,
        text_tokens=workload.prompt_tokens,
        image_tokens=pictures.image_tokens,
        positions=workload.prompt_tokens + pictures.image_tokens + NUM_DECODE_STEPS,
    )


def _image_rule(workloads: Sequence[Workload], pictures: Sequence[Pictures]) -> ImageRule:
    """What one image amounts to; per cell when pictures of several sizes agree on it."""
    first = pictures[0].request
    tiling = getattr(first.config, "tiling", None)
    if isinstance(tiling, Tiling):
        return _tile_rule(tiling, workloads[0].image_size or (first.width, first.height))
    patches = [-(-one.patches // w.num_images) for w, one in zip(workloads, pictures, strict=True)]
    tokens = [-(-one.image_tokens // w.num_images) for w, one in zip(workloads, pictures, strict=True)]
    cells = [one.request.height * one.request.width // first.step_px**2 for one in pictures]
    by_cell = len(set(cells)) > 1 and all(
        count * cells[0] == cell * counts[0] and counts[0] % cells[0] == 0
        for counts in (patches, tokens)
        for count, cell in zip(counts, cells, strict=True)
    )
    return ImageRule(
        native_px=workloads[0].image_size or (first.width, first.height),
        any_size=pictures[0].any_size,
        cell_px=first.step_px if by_cell else None,
        patches=patches[0] // cells[0] if by_cell else patches[0],
        tokens=tokens[0] // cells[0] if by_cell else tokens[0],
    )


def _tile_rule(tiling: Tiling, native_px: tuple[int, int]) -> ImageRule:
    """What one tile amounts to."""
    return ImageRule(
        native_px=native_px,
        any_size=True,
        cell_px=None,
        patches=tiling.patches_per_tile,
        tokens=tiling.positions_per_tile,
        tiling=tiling,
    )
