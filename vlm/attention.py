"""Attention through transformers' interface: heads of queries, keys and values -> mixed values.

It knows neither caches nor positions: what is attended to is decided before, by whom calls.

Shapes: B batch, T tokens, C cached and new positions, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(
    module: nn.Module,
    query_BHTE: torch.Tensor,
    key_BKCE: torch.Tensor,
    value_BKCE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its whole score matrix, (B, T, H, E); called by transformers' attention interface."""
    groups = query_BHTE.shape[1] // key_BKCE.shape[1]
    scores_BHTC = query_BHTE @ key_BKCE.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHTC = scores_BHTC + attention_mask
    weights_BHTC = scores_BHTC.softmax(dim=-1, dtype=torch.float32).to(query_BHTE.dtype)
    output_BHTE = weights_BHTC @ value_BKCE.repeat_interleave(groups, dim=1)
    return output_BHTE.transpose(1, 2).contiguous(), weights_BHTC


def attend(
    module: Any,
    query_BHTE: torch.Tensor,
    key_BKCE: torch.Tensor,
    value_BKCE: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Mixed values, heads side by side (B, T, H * E), by the implementation that `module.config` names.

    The module says whether it is causal (`is_causal`), its head width (`head_dim`) and, where keys are shared by
    several query heads, by how many (`num_key_value_groups`).
    """
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    output_BTHE, _ = implementation(
        module,
        query_BHTE,
        key_BKCE,
        value_BKCE,
        attention_mask,
        dropout=0.0,
        scaling=module.head_dim**-0.5,
        **kwargs,
    )
    return output_BTHE.flatten(2)


def split_heads(states_BTO: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A projection's output (B, T, heads * E) as (B, heads, T, E)."""
    return states_BTO.unflatten(-1, (-1, head_dim)).transpose(1, 2)
