"""The maps that transformers makes by itself: `auto`, `balanced`, `balanced_low_0`, `sequential`, by its own code."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map
from transformers.quantizers import HfQuantizer

from planner.diagnosis.map_file import GivenMap, given_map
from planner.errors import UnsupportedModelError
from planner.machine import Machine
from runtime.mismatch import place_of
from runtime.quiet import quiet_libraries

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

HOST_BYTES = 2**50
"""What the planner may put on the host when the GPUs are full."""


def auto_map(model: nn.Module, strategy: str, machine: Machine, quantiser: HfQuantizer | None = None) -> GivenMap:
    """What `from_pretrained(device_map=strategy)` would do on `machine`, whose sizes it takes as free memory.

    With a `quantiser`, the layers of `model` are its own already.
    Raises: ValueError for an unknown strategy; UnsupportedModelError when transformers' planner stops, or for a model
    that is none of transformers'.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"{strategy!r} is no strategy: known are {', '.join(STRATEGIES)}")
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{strategy} is transformers' own: {type(model).__name__} is none of its models")
    max_memory: dict[int | str, Any] = {device.index: device.memory_bytes for device in machine.devices}
    try:
        with quiet_libraries():
            entries = _inferred(model, strategy, {**max_memory, "cpu": HOST_BYTES}, quantiser)
    except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        place = place_of(error)
        raise UnsupportedModelError(
            f"transformers finds no map by {strategy!r} for {type(model).__name__}: {type(error).__name__}: {error}"
            f"{f' at {place}' if place else ''}. Write the map by hand, or take our plan."
        ) from error
    return given_map(entries, strategy)


def _inferred(
    model: PreTrainedModel, strategy: str, max_memory: dict[int | str, Any], quantiser: HfQuantizer | None
) -> dict[str, Any]:
    no_split: Any = model._no_split_modules
    if strategy != "sequential":
        max_memory = get_balanced_memory(
            model,
            max_memory=max_memory,
            no_split_module_classes=no_split,
            hf_quantizer=quantiser,
            low_zero=strategy == "balanced_low_0",
        )
    if quantiser is not None:
        max_memory = quantiser.adjust_max_memory(max_memory)
    unplaced = getattr(model, "_no_placement_params", None)
    return dict(
        infer_auto_device_map(
            model,
            max_memory=max_memory,
            no_split_module_classes=no_split,
            no_placement_params=unplaced,
            hf_quantizer=quantiser,
        )
    )
