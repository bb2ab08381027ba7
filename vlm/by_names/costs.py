"""Costs of a model that no class is known for, from its checkpoint's names and config."""

from __future__ import annotations

import hashlib
import json

from planner.errors import NoClassError, UnsupportedModelError
from planner.workload import Workload
from vlm.by_names.facts import Facts, facts_of
from vlm.by_names.graph import graph_by_names
from vlm.by_names.parts import Shape, parts_of
from vlm.checkpoint import Checkpoint
from vlm.image_rule import ImageRule
from vlm.traced import TracedCosts, TracedModel

VERSIONS = "names of weights, no code"


def costs_by_names(model: TracedModel, checkpoint: Checkpoint, workload: Workload, why: NoClassError) -> TracedCosts:
    """What can be said of a checkpoint's model without its code: a graph whose `assumptions` say what it rests on.

    Raises: UnsupportedModelError, `why` there is no code included, when the names are not those of a decoder.
    """
    shapes = {name: header.shape for name, header in checkpoint.tensors.items()}
    try:
        parts = parts_of(shapes)
        facts = facts_of(model.config, parts)
    except UnsupportedModelError as problem:
        raise UnsupportedModelError(f"{why}. By the names of its weights it cannot be planned: {problem}") from problem
    return TracedCosts(
        graph=graph_by_names(model.name, parts, facts, workload),
        image=_image_rule(facts, model.name) if workload.num_images else None,
        fingerprint=_fingerprint(shapes),
        max_positions=facts.max_positions,
        versions=VERSIONS,
    )


def _image_rule(facts: Facts, name: str) -> ImageRule:
    if facts.picture is None:
        raise UnsupportedModelError(
            f"the config of {name} does not say how many positions a picture takes: plan with --num-images 0, and "
            "count them in --prompt-tokens"
        )
    picture = facts.picture
    return ImageRule(
        native_px=(picture.side_px, picture.side_px),
        any_size=False,
        cell_px=None,
        patches=picture.patches,
        tokens=picture.positions,
    )


def _fingerprint(shapes: dict[str, Shape]) -> str:
    content = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
