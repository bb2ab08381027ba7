"""The model without its weights: real modules, parameters on the meta device, buffers real."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config
from vlm.internlm_xcomposer2.modeling import InternLM2ForCausalLM, InternLMXComposer2ForCausalLM
from vlm.model import Model

_CLASSES = {
    "InternLM2ForCausalLM": (InternLM2Config, InternLM2ForCausalLM),
    "InternLMXComposer2ForCausalLM": (InternLMXComposer2Config, InternLMXComposer2ForCausalLM),
}


def build_skeleton(model: Model, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The module tree of `model` in `dtype`, ready to be filled weight by weight.

    Buffers are computed for real, because no checkpoint contains them.
    """
    config_class, model_class = _CLASSES[model.facts.architecture]
    config = config_class.from_dict(dict(model.config))
    config._attn_implementation = attention
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        skeleton = model_class(config)
    skeleton.tie_weights()
    return skeleton.to(dtype).eval()
