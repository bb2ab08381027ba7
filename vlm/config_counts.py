"""Counts that a model's config gives, under whatever name: transformers', ChatGLM's and GPT-2's spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LANGUAGE_CONFIGS = ("text_config", "language_config", "llm_config")
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "ffn_width": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "expert_width": ("moe_intermediate_size",),
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "num_active_experts": ("num_experts_per_tok", "moe_top_k"),
    "num_shared_experts": ("n_shared_experts",),
    "max_positions": ("max_position_embeddings", "seq_length", "n_positions"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
}


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is the language model's; the whole where it has no parts."""
    return next((config[name] for name in _LANGUAGE_CONFIGS if isinstance(config.get(name), Mapping)), config)


def count_in(config: Mapping[str, Any], name: str) -> int | None:
    """A count of `SPELLINGS` in this level of a config; None where it has none that is above zero."""
    values = (config.get(spelling) for spelling in SPELLINGS[name])
    return next((value for value in values if type(value) is int and value > 0), None)


def vocab_size_of(config: Mapping[str, Any]) -> int:
    """Rows of the head; 0 where no level of the config names any."""
    levels = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return max((count_in(level, "vocab_size") or 0 for level in levels), default=0)
