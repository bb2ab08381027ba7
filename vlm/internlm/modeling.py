"""InternLM-7B and -20B: transformers' own Llama, whose parameters have the official names already."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from vlm.internlm.configuration import InternLMConfig


class InternLMForCausalLM(LlamaForCausalLM):
    """Llama with biases in attention where the config says so."""

    config_class = InternLMConfig
    config: InternLMConfig
    # The official code keeps one such buffer per layer.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
