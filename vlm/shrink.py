"""A small config of any vision-language architecture, by rules on key names.

The rules know what a key means (a width, a head count, a token id), never which architecture it belongs to. They keep
one layer of every kind, every special token, and every equality between sizes that an architecture relies on.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

Level = dict[str, Any]
"""One level of a config as a dictionary; its sub-configs are dictionaries in it."""

WIDTH = 128
"""One width for vision and text, so that sizes which an architecture wants equal stay equal, or become so: many default
configs contradict themselves."""
NUM_HEADS = 4
HEAD_DIM = WIDTH // NUM_HEADS
LORA_RANK = 32
NUM_EXPERTS = 4
NUM_CODES = 64
MIN_LAYERS = 2
MAX_POSITIONS = 1024
GRID = 8
"""Patches per side of a fixed-size image: merging by 2 or 4, or both in turn, still divides it."""
PLAIN_TOKENS = 128
"""Token ids below this stay as they are; larger ones move down and keep their order."""
MAX_TOKEN_GAP = 16

_WIDTH = re.compile(
    r"hidden_sizes?$|hidden_dim$|^d_model$|embed_dim$|embed_proj_dim$|^(projection|output|vision_output)_dim$|"
    r"projector_(in|out)put_dim$|^adapter_(in|out)_dim$|adapter_input_size$|output_proj_dims$|"
    r"(output|downsample)_channels$|post_conv_\w+_channels$"
)
_INPUT_WIDTH = re.compile(r"patch_embed_hidden_size$|hidden_size_per_layer_input$")
"""Widths of raw patches, or sizes of their own: nothing else depends on them."""
_INNER = re.compile(
    r"intermediate_size(_mlp)?$|ffn_dim$|^d_ff$|^mlp_dim$|moe_hidden_size$|share_expert_dim$|^merged_hidden"
)
_HEADS = re.compile(r"(^|_)(n_)?heads$|^num_groups$")
_HEAD_DIM = re.compile(r"head_dim$|^d_kv$|^rotary_dim$|dim_head$")
_DEPTH = re.compile(r"num_(hidden_|decoder_|global_)?layers$|^(n_)?layers$|^(en|de)coder_layers$|depths?$")
_LAYER_INDEX_LIST = re.compile(r"(indexes|indices|idxs|_layers|layer_ids)$")
_OTHER_LEVEL_LAYER = re.compile(r"vision_feature_layer$|^spatial_(vision|target)_layers?$|^deepstack_layer_map$")
"""Indices into the layers of another level of the config."""
_TOKEN = re.compile(
    r"(token|start|end|newline|patch)_(id|ids|index)$|(?<!mel_)(?<!type_)vocab_(size|offset)$|^vocab_size_per"
)
_PLACEHOLDER = re.compile(r"^(image|video|audio)_token_(id|index)$")

_SIMPLE_RULES: tuple[tuple[re.Pattern[str], Callable[[int], int]], ...] = (
    (re.compile(r"lora_rank$|laurel_rank$|hc_lowrank$"), lambda value: min(value, LORA_RANK)),
    (re.compile(r"(num|n_routed|num_local)_experts$"), lambda value: min(value, NUM_EXPERTS)),
    (re.compile(r"experts_per_tok$|moe_topk$|moe_k$|top_k_experts$|^n_groups?$"), lambda value: min(value, 2)),
    (re.compile(r"^topk_group$"), lambda value: 1),
    (re.compile(r"^max_position_embeddings$"), lambda value: min(value, MAX_POSITIONS)),
    (re.compile(r"^num_embeddings$|^codebook_size$"), lambda value: min(value, NUM_CODES)),
    (re.compile(r"^base_channels$|^latent_channels$"), lambda value: min(value, 32)),
    (re.compile(r"^ngram_vocab_size_base$"), lambda value: min(value, 500)),
)
"""Rules that look at nothing but the value. 32 channels: the smallest that group norms of 32 groups accept."""

_ALIASES = {
    "hidden_size": ("hidden_size", "d_model", "embed_dim"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layers", "layers", "depth", "encoder_layers"),
}


def shrink(config: PreTrainedConfig, *, keep_images: bool = False) -> PreTrainedConfig:
    """A small config of the same architecture.

    `keep_images` leaves image sizes and everything that decides how many positions an image takes as they are: then the
    small model answers that question for the large one.
    """
    config = _with_vision(config)
    root = _shrunk_level(config.to_dict(), config, parent_width=None)
    root.pop("quantization_config", None)
    if not keep_images:
        _shrink_images(root)
    _shrink_tokens(root)
    _clamp_layer_references(root)
    return type(config).from_dict(root)


def _with_vision(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with a default vision part where that is optional and absent."""
    config = copy.deepcopy(config)
    spec = getattr(type(config), "sub_configs_defaults", {}).get("vision_config")
    if spec is not None and getattr(config, "vision_config", None) is None:
        config.vision_config = spec.default_config
    return config


# Reading levels


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_count, value))


def _sub_levels(level: Level) -> dict[str, Level]:
    return {key: value for key, value in level.items() if isinstance(value, dict) and "model_type" in value}


def _levels(level: Level) -> Iterator[Level]:
    yield level
    for sub_level in _sub_levels(level).values():
        yield from _levels(sub_level)


def _count(level: Level, name: str) -> int | None:
    """The count that `name` or one of its aliases gives on this level."""
    return next((level[alias] for alias in _ALIASES[name] if _is_count(level.get(alias))), None)


def _num_layers(level: Level) -> int | None:
    """Layers of this level; hybrid models only list their kinds."""
    kinds = level.get("layers_block_type")
    return _count(level, "num_hidden_layers") or (len(kinds) if isinstance(kinds, list) else None)


def _each(value: Any, rule: Callable[[int], int]) -> Any:
    """`rule` on a count or on each count of a list; anything else unchanged."""
    if _is_count(value):
        return rule(value)
    return [_each(item, rule) for item in value] if isinstance(value, list | tuple) else value


# Layers


def _overrides(level: Level) -> dict[int, Level]:
    """Settings of single layers that differ from the level's own, by layer index."""
    return {int(layer): settings for layer, settings in (level.get("per_layer_config") or {}).items()}


def _is_per_layer(value: Any, num_layers: int) -> bool:
    """Whether a list holds one value per layer, not layer indices."""
    plain = isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)
    return plain and len(value) == num_layers and value != list(range(num_layers))


def _layer_kinds(level: Level, num_layers: int) -> Iterator[list[Any]]:
    """For each key that distinguishes layers, what it says of every layer."""
    layers = range(num_layers)
    overrides = _overrides(level)
    yield [repr(overrides.get(layer)) for layer in layers]
    for key, value in level.items():
        if _is_per_layer(value, num_layers):
            yield [repr(item) for item in value]
        elif _LAYER_INDEX_LIST.search(key) and _is_counts(value):
            yield [layer in value for layer in layers]
        elif key == "insert_layer_id" and _is_count(value):
            yield [layer == value for layer in layers]
        elif key == "first_k_dense_replace" and _is_count(value):
            yield [layer < value for layer in layers]
        elif key == "num_kv_shared_layers" and _is_count(value):
            yield [layer >= num_layers - value for layer in layers]


def _kept_layers(level: Level, num_layers: int) -> list[int]:
    """Indices of the first layer of every kind, at least `MIN_LAYERS`; of more than six the first and last three."""
    first: dict[tuple[Any, ...], int] = {}
    for layer, kind in enumerate(zip(*_layer_kinds(level, num_layers), strict=True)):
        first.setdefault(kind, layer)
    kept = sorted(first.values())
    kept = kept if len(kept) <= 6 else kept[:3] + kept[-3:]
    others = [layer for layer in range(num_layers) if layer not in kept]
    return sorted(kept + others[: max(0, MIN_LAYERS - len(kept))])


def _shrink_layers(level: Level) -> None:
    """Keep one layer of each kind, and translate every key that lists or counts layers."""
    num_layers = _num_layers(level)
    if num_layers is None:
        return
    kept = _kept_layers(level, num_layers)
    if level.get("per_layer_config"):
        overrides = _overrides(level)
        level["per_layer_config"] = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}
    for key, value in level.items():
        level[key] = _translated(key, value, kept, num_layers)


def _translated(key: str, value: Any, kept: list[int], num_layers: int) -> Any:
    """What a key that lists or counts layers says when only `kept` of `num_layers` remain."""
    if _is_per_layer(value, num_layers):
        return [value[layer] for layer in kept]
    if _LAYER_INDEX_LIST.search(key) and _is_counts(value):
        return [new for new, old in enumerate(kept) if old in value]
    if not _is_count(value):
        return [min(item, MIN_LAYERS) for item in value] if key == "depths" else value
    if key == "insert_layer_id":
        return kept.index(value) if value in kept else 0
    if key == "first_k_dense_replace":
        return sum(layer < value for layer in kept)
    if key == "num_kv_shared_layers":
        return sum(layer >= num_layers - value for layer in kept)
    if _DEPTH.search(key):
        return len(kept) if value == num_layers else min(value, MIN_LAYERS)
    return min(value, MIN_LAYERS) if key.endswith("layers_per_attn_res_block") else value


# Widths, heads and rotary sections


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The sizes of a level before shrinking, in terms of which its other sizes are read."""

    width: int | None
    num_heads: int | None
    head_dim: int | None

    @classmethod
    def of(cls, level: Level, parent_width: int | None) -> _Sizes:
        settings = [level, *_overrides(level).values()]
        dims = [value for one in settings for key, value in one.items() if _HEAD_DIM.search(key) and _is_count(value)]
        return cls(
            width=_count(level, "hidden_size") or parent_width,
            num_heads=_count(level, "num_attention_heads"),
            head_dim=min((dim for dim in dims if dim > 0), default=None),
        )

    def inner(self, value: int) -> int:
        """An MLP's width: its ratio to the level's width, between 1 and 4, stays."""
        return WIDTH * max(1, min(4, round(value / self.width))) if self.width else 2 * WIDTH

    def heads(self, value: int) -> int:
        """A power of two in the level's ratio of heads to key-value heads, so that one divides the other."""
        ratio = NUM_HEADS * value / self.num_heads if self.num_heads else value
        return min(NUM_HEADS, 2 ** int(math.log2(max(ratio, 1))))

    def head(self, value: int) -> int:
        """A head's width, or a part of it, in the ratio to the smallest one; zero means none."""
        return value and max(8, round(HEAD_DIM * value / (self.head_dim or value) / 8) * 8)


def _shrunk_level(level: Level, config: PreTrainedConfig, parent_width: int | None) -> Level:
    """The level and its sub-levels with fewer layers and smaller sizes; token ids and images are still as they were."""
    sizes = _Sizes.of(level, parent_width)
    small = dict(level)
    _shrink_layers(small)
    small = {key: _shrunk_size(key, value, sizes) for key, value in small.items()}
    _shrink_products(small, level)
    _shrink_rope(small, sectioned="mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()))
    for key, sub_level in _sub_levels(level).items():
        small[key] = _shrunk_level(sub_level, getattr(config, key), sizes.width)
    return small


def _shrunk_size(key: str, value: Any, sizes: _Sizes) -> Any:
    if key == "per_layer_config" and value:
        return {layer: {k: _shrunk_size(k, v, sizes) for k, v in one.items()} for layer, one in value.items()}
    if _HEAD_DIM.search(key):
        return _each(value, sizes.head)
    if _INNER.search(key):
        return _each(value, sizes.inner)
    if _WIDTH.search(key) and not _INPUT_WIDTH.search(key):
        return _each(value, lambda width: width and WIDTH)
    if _HEADS.search(key):
        return [NUM_HEADS] * len(value) if isinstance(value, list) else _each(value, sizes.heads)
    rule = next((rule for pattern, rule in _SIMPLE_RULES if pattern.search(key)), None)
    return _each(value, rule) if rule else value


def _shrink_products(small: Level, level: Level) -> None:
    """Sizes that are products of others: what a concatenation of layers or a merge of neighbouring patches yields."""
    if _is_counts(small.get("intermediate_layers_indices")):
        small["vision_output_dim"] = WIDTH * (1 + len(small["intermediate_layers_indices"]))
    if isinstance(ratio := level.get("pixel_shuffle_ratio"), float):
        small["intermediate_size"] = round(WIDTH / ratio**2)
    width = next((_count(sub, "hidden_size") for key, sub in _sub_levels(level).items() if "vision" in key), None)
    if width and _is_count(level.get("out_hidden_size")):
        small["out_hidden_size"] = WIDTH * max(1, round(level["out_hidden_size"] / width))


def _shrink_rope(level: Level, *, sectioned: bool) -> None:
    """Multi-axis rotary sections that fill half of the rotated width. Classes that have them assume the sections of the
    full-size model when the config gives none."""
    rope = level.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    head_dim = level.get("qk_rope_head_dim") or level.get("head_dim") or HEAD_DIM
    level["rope_parameters"] = rope = copy.deepcopy(rope)
    for one in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        sections = one.get("mrope_section") or ([3, 3, 2] if sectioned else None)
        if sections:
            total = int(head_dim * one.get("partial_rotary_factor", 1.0)) // 2
            one["mrope_section"] = _sections(sections, total)


def _sections(sections: list[int], total: int) -> list[int]:
    """Positive integers in about these proportions with this sum."""
    scaled = [max(1, total * section // sum(sections)) for section in sections]
    scaled[scaled.index(max(scaled))] += total - sum(scaled)
    return scaled


# Images, tokens, references


def _side(value: Any) -> int:
    return value[0] if isinstance(value, list | tuple) else value


def _shrink_images(root: Level) -> None:
    """Fixed image sizes to `GRID` patches per side, and what follows from them."""
    pinpoints = root.get("image_grid_pinpoints")
    for level in _levels(root):
        patch, image = level.get("patch_size"), level.get("image_size")
        if image is not None and patch is not None:
            old_grid = _side(image) // _side(patch)
            side = GRID * _side(patch)
            level["image_size"] = [side] * len(image) if isinstance(image, list) else side
            if level.get("num_position_embeddings") == old_grid**2:
                level["num_position_embeddings"] = GRID**2
        elif "channel_multiplier" in level and "resolution" in level:
            level["resolution"] = GRID * 2 ** (len(level["channel_multiplier"]) - 1)
    if pinpoints and (tile := _side(_sub_levels(root)["vision_config"].get("image_size"))):
        unit = min(min(pair) for pair in pinpoints)
        root["image_grid_pinpoints"] = [[side // unit * tile for side in pair] for pair in pinpoints]
    for level in _levels(root):
        if "latent_query_num" in level:
            level["latent_query_num"] = min(level["latent_query_num"], GRID**2)
        if "mm_tokens_per_image" in level:
            level["mm_tokens_per_image"] = (GRID // 2) ** 2
        if "projector_patch_to_query_dict" in level:
            level["projector_patch_to_query_dict"] = {str(GRID**2): GRID}
            level["max_value_projector_patch_to_query_dict"] = GRID


def _token_map(root: Level) -> dict[int, int]:
    """Where each token id, vocabulary size and vocabulary offset goes: the order stays, the gaps close."""
    points = {value for level in _levels(root) for key, value in _token_items(level) if value >= 0}
    moved = {point: point for point in points if point <= PLAIN_TOKENS}
    last_old = last_new = PLAIN_TOKENS
    for old in sorted(point for point in points if point > PLAIN_TOKENS):
        last_new += min(old - last_old, MAX_TOKEN_GAP)
        last_old = old
        moved[old] = last_new
    return moved


def _token_items(level: Level) -> Iterator[tuple[str, int]]:
    for key, value in level.items():
        if _TOKEN.search(key):
            yield from ((key, item) for item in (value if isinstance(value, list) else [value]) if _is_count(item))


def _shrink_tokens(root: Level) -> None:
    """Small vocabularies that contain every special token, the missing placeholders among them."""
    moved = _token_map(root)
    tokens = [
        token for level in _levels(root) for key, token in _token_items(level) if "vocab" not in key and token >= 0
    ]
    top = max(map(moved.__getitem__, tokens), default=PLAIN_TOKENS)
    for level in _levels(root):
        for key, value in level.items():
            if _TOKEN.search(key):
                level[key] = _each(value, lambda token: moved.get(token, token))
            if _PLACEHOLDER.search(key) and value is None:
                level[key] = top = top + 1
    if "vocabulary_map" in root:
        root["vocabulary_map"] = _vocabulary_map(top + 1)
        root["image_token_id"] = root["vocabulary_map"]["<image>"]
        top += len(root["vocabulary_map"])
    for level in _levels(root):
        if _is_count(level.get("vocab_size")) and level["vocab_size"] > PLAIN_TOKENS:
            level["vocab_size"] = max(level["vocab_size"], top + 1)


def _vocabulary_map(first: int) -> dict[str, int]:
    """Names and ids of the tokens that stand for image codes, in both spellings that models parse."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = ["<image>", "<|extra_200|>"]
    names += [f"IMGIMG{str(code).translate(letters)}Z" for code in range(NUM_CODES)]
    names += [f"<|visual token {code:06d}|>" for code in range(NUM_CODES)]
    return {name: first + index for index, name in enumerate(names)}


def _clamp_layer_references(root: Level) -> None:
    """Indices into the layers of another level within what is left of them."""
    num_layers = min(filter(None, map(_num_layers, _levels(root))), default=MIN_LAYERS)
    for level in _levels(root):
        for key in filter(_OTHER_LEVEL_LAYER.search, list(level)):
            level[key] = _each(level[key], lambda layer: max(-num_layers, min(layer, num_layers - 1)))
