"""Tiny InternLM2 family models with random weights, and the same language model as transformers' Llama.

torch and transformers are imported when a test asks for a model: other tests of this folder need neither.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
    "eos_token_id": None,
}
# 8 px in patches of 4: four positions per image. Rank and alpha differ, so that a forgotten scale shows.
COMPOSER = {
    **TEXT,
    "img_size": 8,
    "plora_rank": 4,
    "plora_alpha": 6,
    "image_token_id": 39,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
    },
}
LLAMA_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output.": "lm_head.",
}


def _randomised(model, *, seed=0):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.25, generator=generator)
    return model.eval()


def _as_llama(weights, config, *, attention="eager"):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    settings |= {"attention_bias": config.bias, "mlp_bias": False, "attn_implementation": attention}
    converted = {}
    for name, tensor in weights.items():
        if "wqkv" in name:
            converted |= _unpacked(name, tensor, config)
            continue
        for old, new in LLAMA_NAMES.items():
            name = name.replace(old, new)
        converted[name] = tensor
    llama = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    llama.load_state_dict(converted)
    return llama


def _unpacked(name, packed, config):
    import torch

    rows = packed.split(config.hidden_size // config.num_attention_heads)
    per_group = config.num_attention_heads // config.num_key_value_heads + 2
    groups = [rows[start : start + per_group] for start in range(0, len(rows), per_group)]
    parts = {
        "q_proj": [row for group in groups for row in group[:-2]],
        "k_proj": [group[-2] for group in groups],
        "v_proj": [group[-1] for group in groups],
    }
    return {name.replace("attention.wqkv", f"self_attn.{part}"): torch.cat(heads) for part, heads in parts.items()}


@pytest.fixture(scope="session")
def internlm2_settings() -> dict[str, Any]:
    """Configuration of a tiny text model without an end token, so that it generates what is asked for."""
    return TEXT


@pytest.fixture(scope="session")
def xcomposer2_settings() -> dict[str, Any]:
    """Configuration of a tiny vision-language model: id 39 at image positions, four for an image of 8 x 8."""
    return COMPOSER


@pytest.fixture(scope="session")
def randomised():
    """Function: the model with every parameter drawn anew, norms and biases too, in evaluation mode."""
    return _randomised


@pytest.fixture(scope="session")
def as_llama():
    """Function: Llama with the weights of an InternLM2 configuration: `wqkv` unpacked, the rest renamed."""
    return _as_llama


@pytest.fixture(scope="session")
def xcomposer2():
    """A tiny vision-language model that no test may change."""
    from vlm.internlm_xcomposer2.modeling import InternLMXComposer2ForCausalLM

    return _randomised(InternLMXComposer2ForCausalLM(InternLMXComposer2ForCausalLM.config_class(**COMPOSER)))


def _write_sentencepiece(folder: Path, *specials: str) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["What is this?", "This is a cat; where is the cat?", "Yes, the cat is there."]),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=list(specials),
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


@pytest.fixture(scope="session")
def write_sentencepiece():
    """Function: a small sentencepiece model with these special pieces, written into a folder as tokenizer.model."""
    return _write_sentencepiece
