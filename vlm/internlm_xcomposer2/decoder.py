"""Decoder layer of InternLM2: hidden states and the cache so far -> hidden states and a longer cache.

It holds no buffers: rotary cosines and sines are arguments, computed once per forward. It knows neither tokens nor
images, only which rows of the batch are image positions.

Shapes: B batch, T tokens, C cached and new positions, D width, F feed-forward width, H heads, K key/value heads,
G heads per key/value head, S slots per key/value head in the packed projection (G + 2), O its width, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm.attention import eager_attention
from vlm.internlm_xcomposer2.configuration import InternLM2Config
from vlm.internlm_xcomposer2.plora import LinearFactory, Linears, project
from vlm.rotary import Rotary, rotate


class InternLM2RMSNorm(nn.Module):
    """Scaling to a root mean square of one, in float32, then by a weight in the input's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        wide_BTD = hidden_BTD.float()
        wide_BTD = wide_BTD * torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide_BTD.to(hidden_BTD.dtype)


def rotary_base(config: InternLM2Config, num_positions: int) -> float:
    """Rotary base for a sequence of `num_positions`, cached and padded ones included.

    It grows only beyond the trained length (dynamic NTK). It depends on this length alone: the official code also
    remembers the longest sequence so far, and would answer differently after one.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default" or num_positions <= config.max_position_embeddings:
        return rope["rope_theta"]
    stretch = rope["factor"] * num_positions / config.max_position_embeddings - (rope["factor"] - 1)
    return rope["rope_theta"] * stretch ** (config.head_dim / (config.head_dim - 2))


class InternLM2Attention(nn.Module):
    """Grouped-query attention over one packed projection.

    The rows of `wqkv` are, for every key/value head, its G query heads, then its key, then its value.
    """

    def __init__(self, config: InternLM2Config, layer_idx: int, linears: Linears) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        num_packed_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = linears.packed(config.hidden_size, num_packed_heads * config.head_dim, bias=config.bias)
        self.wo = linears.other(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        position_embeddings: Rotary,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        query_BHTE, key_BKCE, value_BKCE = self._heads(project(self.wqkv, hidden_BTD, image_index))
        query_BHTE = rotate(query_BHTE, position_embeddings)
        key_BKCE = rotate(key_BKCE, position_embeddings)
        if past_key_values is not None:
            # Also rebinds the value, whose view would keep the packed projection alive through attention.
            key_BKCE, value_BKCE = past_key_values.update(key_BKCE, value_BKCE, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output_BTHE, _ = attend(
            self, query_BHTE, key_BKCE, value_BKCE, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return project(self.wo, output_BTHE.flatten(2), image_index)

    def _heads(self, packed_BTO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slots = self.num_key_value_groups + 2
        packed_BTKSE = packed_BTO.unflatten(-1, (self.num_key_value_heads, slots, self.head_dim))
        query_BTHE = packed_BTKSE[..., :-2, :].flatten(2, 3)
        key_BTKE, value_BTKE = packed_BTKSE[..., -2, :], packed_BTKSE[..., -1, :]
        return query_BTHE.transpose(1, 2), key_BTKE.transpose(1, 2), value_BTKE.transpose(1, 2)


class InternLM2MLP(nn.Module):
    """Gated feed-forward: w2(act(w1 x) * w3 x)."""

    def __init__(self, config: InternLM2Config, linear: LinearFactory) -> None:
        super().__init__()
        self.w1 = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_BTD: torch.Tensor, image_index: torch.Tensor | None = None) -> torch.Tensor:
        # One expression: a named gate or product would outlive its use, and each is (B, T, F).
        return project(
            self.w2,
            self.act_fn(project(self.w1, hidden_BTD, image_index)) * project(self.w3, hidden_BTD, image_index),
            image_index,
        )


class InternLM2DecoderLayer(nn.Module):
    """Attention and feed-forward, each on normalised input and added to its own."""

    def __init__(self, config: InternLM2Config, layer_idx: int, linears: Linears) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx, linears)
        self.feed_forward = InternLM2MLP(config, linears.other)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_BTD: torch.Tensor, image_index: torch.Tensor | None = None, **attention_kwargs: Any
    ) -> torch.Tensor:
        hidden_BTD = hidden_BTD + self.attention(
            self.attention_norm(hidden_BTD), image_index=image_index, **attention_kwargs
        )
        return hidden_BTD + self.feed_forward(self.ffn_norm(hidden_BTD), image_index)
