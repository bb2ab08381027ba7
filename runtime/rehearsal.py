"""What it takes to run a model without its weights: the skeleton, a prompt of a workload's sizes, and the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from planner.errors import UnsupportedModelError
from planner.workload import Workload
from runtime.steps import Steps, forward_and_decode
from vlm.inputs import Pictures, example_pictures
from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config
from vlm.internlm_xcomposer2.workload_inputs import workload_inputs
from vlm.model import Model
from vlm.skeleton import build_skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """A model on the meta device, its forward's arguments, and what is run: a prefill and decode steps."""

    skeleton: PreTrainedModel
    inputs: Mapping[str, Any]
    steps: Steps


def rehearsal(model: Model, workload: Workload) -> Rehearsal:
    """A rehearsal of a resolved workload at full size.

    Raises: UnsupportedModelError for a model that cannot be built, or takes images in no known form.
    """
    skeleton = build_skeleton(model, dtype=getattr(torch, workload.dtype), attention=workload.attention)
    steps = forward_and_decode(num_beams=workload.num_beams)
    return Rehearsal(skeleton=skeleton, inputs=inputs_of(skeleton, workload), steps=steps)


def inputs_of(skeleton: PreTrainedModel, workload: Workload) -> dict[str, Any]:
    """Arguments of a prefill of a resolved workload's sizes; in a batch the prompts are uneven."""
    if type(skeleton.config) in (InternLM2Config, InternLMXComposer2Config):  # and none that derives from them
        return workload_inputs(skeleton.config, workload)
    return prompt_of_pictures(pictures_of(skeleton, workload), workload, skeleton.dtype)


def pictures_of(skeleton: PreTrainedModel, workload: Workload) -> Pictures:
    """A workload's images, for any model of transformers."""
    width_height = workload.image_size
    return example_pictures(
        skeleton,
        batch_size=workload.batch_size,
        num_images=workload.num_images,
        image_size=(width_height[1], width_height[0]) if width_height else None,
    )


def prompt_of_pictures(pictures: Pictures, workload: Workload, dtype: torch.dtype) -> dict[str, Any]:
    """A workload's prompt with these images, whose pixels are in `dtype`, as a processor's output is cast.

    Raises: UnsupportedModelError for a prompt too short for the tokens that delimit images.
    """
    try:
        inputs = pictures.inputs(workload.prompt_tokens, pad=workload.batch_size > 1)
    except ValueError as problem:
        raise UnsupportedModelError(f"no prompt of {workload.prompt_tokens} tokens can be made: {problem}") from problem
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
