"""A tiny model of any vision-language architecture: its config, made small, and random weights.

Whether it predicts anything is not its concern; it has every module, path and special token of the large one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, PreTrainedModel

from vlm.shrink import shrink

__all__ = ["DEFAULT_REPAIRS", "from_config", "shrink", "tiny_model"]

DEFAULT_REPAIRS: dict[str, dict[str, Any]] = {
    # The text rope is a dictionary per layer type, and the default is empty.
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    # Dense or sparse per layer, and the group sizes of the router, have no defaults.
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 2}},
    # The experts are always there, and have no default count.
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
    # Neither the downsampling nor the layers that receive features has a default.
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 1, 1],
    },
    # Its text model reads the head width without deriving it.
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    # Its rotary sections have a default in the code alone, made for the full-size head.
    "paddleocr_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [16, 24, 24]}}
    },
    # The model reads ids that this config class does not declare.
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652, "vision_end_token_id": 151653},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652, "vision_end_token_id": 151653},
    # The token indexer of its full-attention layers is always built, and has no default sizes.
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
        }
    },
    # A sliding mask is always built, and its window has no default.
    "step3p7": {"text_config": {"sliding_window": 512}},
}
"""What a default config lacks for its class to be built at all. Real configs say all of it."""


NEARLY_ZERO = 1e-3
NOISE = 0.05


def tiny_model(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """The tiny model of a type of transformers' image-text-to-text mapping, with random weights, and its config."""
    config = shrink(CONFIG_MAPPING[model_type](**DEFAULT_REPAIRS.get(model_type, {})))
    return from_config(config, seed=seed, dtype=dtype, attention=attention), config


def from_config(
    config: PreTrainedConfig,
    *,
    model_class: type[PreTrainedModel] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> PreTrainedModel:
    """A model of this config with random weights in evaluation mode, by default the image-text-to-text one."""
    model_class = model_class or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
        for weight in model.parameters():
            # Gates and tables that start at zero would cut the images off.
            if weight.abs().max() < NEARLY_ZERO:
                weight.normal_(std=NOISE)
    return model.eval()
