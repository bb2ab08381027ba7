"""What every decoder-only language model does alike around its layers: embed, mask, count positions, choose logits.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward share: the mask, and the cache with the positions it held before."""

    attention_mask: torch.Tensor | None
    cache: Cache | None
    num_cached: int


def embedded(embed: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The embeddings of ids, or those given.

    Raises: ValueError unless it is exactly one of the two.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds: got " + ("none" if input_ids is None else "both"))
    return embed(input_ids) if inputs_embeds is None else inputs_embeds


def begin_step(
    config: PreTrainedConfig,
    hidden_BTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> Step:
    """The mask for `hidden_BTD` after what is cached; a new cache where one is wanted and none is given."""
    if past_key_values is None and (config.use_cache if use_cache is None else use_cache):
        past_key_values = DynamicCache(config=config)
    num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    # Without position ids: they may be on another device, and would only serve to find packed sequences.
    mask = create_causal_mask(
        config=config, inputs_embeds=hidden_BTD, attention_mask=attention_mask, past_key_values=past_key_values
    )
    return Step(mask, past_key_values, num_cached)


def following_positions(hidden_BTD: torch.Tensor, num_cached: int) -> torch.Tensor:
    """Position ids (1, T) that go on after the cached ones."""
    return torch.arange(num_cached, num_cached + hidden_BTD.shape[1], device=hidden_BTD.device)[None]


def kept_positions(hidden_BTD: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last so many positions (0: all), or those listed."""
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_BTD[:, kept]
