"""From a model and a workload to an explanation: what its config says of a decoder layer, and what pictures take.

Torch-free, and nothing is traced for it beyond what planning the same workload needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from planner.explanation import DecoderFacts, Explanation, Picture, layer_split, parts_of, precisions_of
from planner.machine import Device
from planner.phase_bounds import device_bounds
from planner.workload import Workload
from vlm.config_counts import SPELLINGS, count_in, language_config
from vlm.model import Model
from vlm.traced import TracedModel

EXAMPLE_PX = (1024, 768)
"""Width and height of a picture that is no model's own size."""

PROCESSOR_DECIDES = frozenset(
    {
        *("InternVLForConditionalGeneration", "Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        *("Llama4ForConditionalGeneration", "Mistral3ForConditionalGeneration"),
        *("AyaVisionForConditionalGeneration", "Idefics2ForConditionalGeneration"),
    }
)
"""Architectures whose processor makes more of a picture than the forward shows: tiles of one size, as many as it
likes, or (Mistral 3) rows that round up and end in a token of their own.

Source: transformers 5.23, processing_ and image_processing_ files of these models.
"""


def explain(model: Model, workload: Workload, devices: Iterable[Device] = ()) -> Explanation:
    """Where the bytes of `model` are, and what bounds the workload on each kind of device.

    Raises: ConstraintError for a device of unknown speed, and what the model raises for the workload.
    """
    resolved = model.resolved(workload)
    graph, quantities = model.graph(resolved), model.quantities(resolved)
    facts = decoder_facts(model.config)
    parts = parts_of(graph)
    kinds = {(device.kind or device.name): device for device in devices}
    return Explanation(
        model=model.name,
        architecture=model.architecture,
        dtype=graph.dtype,
        num_parameters=graph.num_parameters,
        weight_bytes=graph.weight_bytes,
        parts=parts,
        layer=layer_split(graph, facts) if facts else None,
        precisions=precisions_of(parts),
        kv_bytes_per_position=graph.kv_bytes_per_position,
        fixed_image_px=_resized_px(model),
        pictures=pictures_of(model),
        quantities=quantities,
        new_tokens=resolved.new_tokens,
        extrapolated=graph.extrapolated(quantities),
        layouts=tuple(dict.fromkeys(layout for _, layout in graph.held)),
        bounds=tuple(device_bounds(graph, device, quantities, resolved.new_tokens) for device in kinds.values()),
    )


def decoder_facts(config: Mapping[str, Any]) -> DecoderFacts | None:
    """What a config says about a decoder layer, under any spelling; None where width, layers or heads are not there.

    None too where a layer caches one latent per position, and no keys and values by head.
    Source of Qwen's rule: its `intermediate_size` counts gate and up together (QwenLM/Qwen, modeling_qwen.py).
    """
    language = language_config(config)
    counts = {name: count_in(language, name) for name in SPELLINGS}
    hidden, layers, heads = counts["hidden_size"], counts["num_layers"], counts["num_heads"]
    if hidden is None or layers is None or heads is None or "kv_lora_rank" in language:
        return None
    width, experts = counts["ffn_width"], counts["num_experts"]
    active = counts["num_active_experts"]
    if experts is not None:
        # A mixture's dense layers have another width; without both counts nothing is known of its experts.
        width = counts["expert_width"] if active else None
    elif language.get("model_type") == "qwen" and width:
        width //= 2
    shared = counts["num_shared_experts"] or 0
    return DecoderFacts(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        head_dim=counts["head_dim"] or hidden // heads,
        num_kv_heads=counts["num_kv_heads"],
        ffn_width=width,
        num_experts=(experts or 1) + shared,
        num_active_experts=(active or 1) + shared,
    )


def _resized_px(model: Model) -> tuple[int, int] | None:
    """Width and height that every picture is resized to, where the whole picture is."""
    return model.fixed_image_px if model.has_images and model.architecture not in PROCESSOR_DECIDES else None


def pictures_of(model: Model) -> tuple[Picture, ...]:
    """The model's own size of picture, and `EXAMPLE_PX` where it takes any; none for a model that does not see."""
    if not model.has_images:
        return ()
    native = model.quantities(model.resolved(Workload())).image_tokens
    if model.fixed_image_px is not None and _resized_px(model) is None:
        found = [Picture(size_px=model.fixed_image_px, num_tokens=native)]
    else:
        found = [Picture(size_px=None, num_tokens=native)]
    if _resized_px(model) is None:
        found.append(Picture(size_px=EXAMPLE_PX, num_tokens=image_tokens(model, EXAMPLE_PX)))
    return tuple(found)


def image_tokens(model: Model, size_px: tuple[int, int]) -> int | None:
    """Positions of one picture of this width and height; None where only a trace or the processor can tell."""
    if model.architecture in PROCESSOR_DECIDES:
        return None
    if not isinstance(model, TracedModel):
        return model.quantities(model.resolved(Workload(image_size=size_px))).image_tokens
    rule = model.find_costs(model, model.resolved(Workload())).image
    counts = rule.counts(size_px) if rule else None
    return counts[1] if counts else None
