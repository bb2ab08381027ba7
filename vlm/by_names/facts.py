"""The counts that a plan needs and names do not say: from the config where it has them, else assumed, and said so.

Source of the config's keys: the remote code and configs listed in docs/models.md and transformers' own configurations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from planner.errors import UnsupportedModelError
from vlm.by_names.parts import Part, Shape
from vlm.config_counts import count_in, language_config

_VISION = ("vision_config", "vision_cfg", "visual", "vit_config")
HEAD_DIM = 128
"""Of attention heads where the config does not count them: most language models' from 7 billion parameters on."""
_POSITIONS = ("num_image_token", "mm_tokens_per_image", "image_seq_length", "num_query_tokens", "query_num")
_KEY = re.compile(r"(^|\.)(k_proj|key|wk|k)\.weight$")
_FUSED = re.compile(r"(^|\.)(qkv_proj|qkv|wqkv|query_key_value|c_attn|W_pack)\.weight$")
_EXPERT = re.compile(r"(^|\.)experts\.(?:(\d+)\.)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What one picture of `side_px` a side amounts to: patches for the encoder, positions in the prompt."""

    side_px: int
    patches: int
    positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Widths and counts of the language model, what a picture is, and how each of them is known."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_active_experts: int | None
    max_positions: int | None
    picture: Picture | None
    config: Mapping[str, Any]
    assumptions: tuple[str, ...]

    def kv_width(self, shapes: Mapping[str, Shape]) -> int:
        """Elements that one position of one sequence adds to a decoder layer's cache, keys and values together."""
        if "kv_lora_rank" in self.config:  # decompressed, as eager code caches them
            heads = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            return self.num_heads * sum(int(self.config.get(key, 0)) for key in heads)
        keys = [shape[0] for name, shape in shapes.items() if _KEY.search(name) and len(shape) == 2]
        fused = [shape[0] for name, shape in shapes.items() if _FUSED.search(name) and len(shape) == 2]
        if keys:
            return 2 * max(keys)
        return max(fused) - self.hidden_size if fused and max(fused) > self.hidden_size else 2 * self.hidden_size

    def matrices(self, shapes: Mapping[str, Shape]) -> list[Shape]:
        """The weights of products that one position goes through: of experts, only as many as it is sent to."""
        found = []
        for name, shape in shapes.items():
            expert = _EXPERT.search(name)
            if expert and len(shape) == 3:  # all experts in one tensor
                found += [shape[1:]] * min(shape[0], self.num_active_experts or shape[0])
            elif len(shape) > 1 and not (expert and int(expert[2] or 0) >= (self.num_active_experts or inf)):
                found.append(shape)
        return found


def facts_of(config: Mapping[str, Any], parts: tuple[Part, ...]) -> Facts:
    """The facts of a model of these parts.

    Raises: UnsupportedModelError when the token embedding is no table.
    """
    language = language_config(config)
    tables = [shape for part in parts if part.role == "embedding" for shape in part.shapes.values() if len(shape) == 2]
    if not tables:
        raise UnsupportedModelError("its token embedding is no table of vectors")
    vocab_size, hidden_size = max(tables)
    has_vision = any(part.role == "vision_encoder" for part in parts)
    picture = _picture(config) if has_vision else None
    return Facts(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_heads=count_in(language, "num_heads") or max(1, hidden_size // HEAD_DIM),
        num_active_experts=count_in(language, "num_active_experts"),
        max_positions=count_in(language, "max_positions"),
        picture=picture,
        config=language,
        assumptions=tuple(_assumptions(picture, has_vision)),
    )


def _assumptions(picture: Picture | None, has_vision: bool) -> Iterator[str]:
    yield "parts, their order and what keeps together go by the names of the weights: no code of the model was run"
    yield (
        "every output of a layer's linear layers is alive at once, attention makes no scores unless eager; logits are "
        "those of the whole prompt, in float32"
    )
    if picture:
        yield (
            f"a picture is {picture.side_px} x {picture.side_px} pixels and {picture.positions} positions, as the "
            "config's numbers have it; a model that cuts pictures into tiles has that many for each (--num-images)"
        )
    elif has_vision:
        yield "the config does not say how many positions a picture takes: count them with --prompt-tokens"


def _picture(config: Mapping[str, Any]) -> Picture | None:
    vision = next((config[name] for name in _VISION if isinstance(config.get(name), Mapping)), config)
    side, patch = _count(vision, "image_size", "img_size"), _count(vision, "patch_size")
    side = _count(config, "force_image_size") or side
    if not side or not patch:
        return None
    patches = (side // patch) ** 2
    ratio, merge = config.get("downsample_ratio"), _count(vision, "spatial_merge_size")
    positions = next((count for key in _POSITIONS if (count := _count(config, key) or _count(vision, key))), None)
    if positions is None:
        kept = ratio**2 if isinstance(ratio, int | float) and 0 < ratio <= 1 else 1 / (merge or 1) ** 2
        positions = round(patches * kept)
    return Picture(side_px=side, patches=patches + 1, positions=positions)


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these keys that holds a positive whole number; of a pair of equal sides, the side."""
    for name in names:
        value = config.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return None
