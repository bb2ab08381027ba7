"""What the weights of XComposer2-4KHD, -2.5 and -2.5-OL say that their config.json does not. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

from planner.errors import SourceError
from vlm.internlm_xcomposer2.facts import CLIP_LARGE, VISION, Shape

ARCHITECTURE = "InternLMXComposer2HDForCausalLM"
"""Our class. The official config.json names InternLMXComposer2ForCausalLM for these models too."""

_SEPARATOR = "plora_glb_GN"
_LAYER = "model.layers.0"
_SMALL_TILE_PX = 336


def is_tiled(names: Container[str]) -> bool:
    """Whether weights of these names are of a model that cuts images into tiles."""
    return _SEPARATOR in names


def completed(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> dict[str, Any]:
    """`config` with the architecture and the keys that the weights' shapes give away; what it says itself stands.

    4KHD, known by its 336-pixel tiles, differs from 2.5 in more than shapes: it fills its tiles with small images too
    and centres them, and its rank of 8 comes with an alpha of 16.
    Source: InternLM/lmdeploy `2266f48bb~1:lmdeploy/vl/model/xcomposer2.py`; the ranks, modelscope/ms-swift #1559.
    Raises: SourceError naming the weights that are missing.
    """
    positions = _shape(shapes, f"{VISION}.embeddings.position_embedding.weight", where)[0]
    packed_rank = _shape(shapes, f"{_LAYER}.attention.wqkv.Plora_A.weight", where)[0]
    rank = _shape(shapes, f"{_LAYER}.attention.wo.Plora_A.weight", where)[0]
    tile_px = math.isqrt(positions - 1) * CLIP_LARGE["patch_size"]
    is_4khd = tile_px == _SMALL_TILE_PX
    found = {
        "architectures": [ARCHITECTURE],
        "img_size": tile_px,
        "plora_rank": rank,
        "plora_alpha": rank,
        "plora_wqkv_rank": packed_rank,
        "plora_wqkv_alpha": 2 * packed_rank if is_4khd else packed_rank,
        "task_loras": _task_ranks(shapes),
        "video_mem_width": shapes.get("video_mem_proj.0.weight", (0, 0))[1],
        "hd_num": 25 if is_4khd else 24,
        "hd_num_several": 25 if is_4khd else 6,
        "hd_upscale": is_4khd,
        "hd_padding": "both" if is_4khd else "bottom",
    }
    return {**found, **config, "architectures": [ARCHITECTURE]}


def _task_ranks(shapes: Mapping[str, Shape]) -> dict[str, int]:
    prefix, suffix = f"{_LAYER}.attention.wo.lora_", "_A.weight"
    return {
        name.removeprefix(prefix).removesuffix(suffix): shape[0]
        for name, shape in shapes.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _shape(shapes: Mapping[str, Shape], name: str, where: str) -> Shape:
    if name not in shapes:
        raise SourceError(
            f"{where}: the weights have {_SEPARATOR}, of a model for tiled images, but not {name}. "
            "Download all shards from the same revision"
        )
    return shapes[name]
