"""The first InternLM against transformers' Llama, and its tokenizer and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from planner.errors import SourceError
from vlm.internlm.configuration import InternLMConfig
from vlm.internlm.modeling import InternLMForCausalLM
from vlm.internlm.processing import InternLMProcessor

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "eos_token_id": None,
}


@pytest.fixture
def build(randomised):
    def model_with(**changes) -> InternLMForCausalLM:
        return randomised(InternLMForCausalLM(InternLMConfig(**{**TEXT, **changes})))

    return model_with


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"bias": False, "rotary": {"base": 100}}, {"rope_type": "default", "rope_theta": 100.0}),
        (
            {"rotary": {"base": 100, "type": "dynamic"}},
            {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 1.0},
        ),
    ],
    ids=["biases", "none", "dynamic"],
)
@torch.no_grad()
def test_logits_equal_llama_with_the_same_weights_also_beyond_the_trained_length(build, attention, changes, rope):
    model = build(attn_implementation=attention, **changes)
    settings = {key: value for key, value in TEXT.items() if key != "eos_token_id"}
    bias = changes.get("bias", True)
    llama = LlamaForCausalLM(
        LlamaConfig(**settings, attention_bias=bias, rope_parameters=rope, attn_implementation="eager")
    ).eval()
    llama.load_state_dict(model.state_dict())
    input_ids = torch.randint(3, 40, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "num_parameters"),
    [
        ({}, 7_321_948_160),
        (
            {
                "hidden_size": 5120,
                "num_hidden_layers": 60,
                "num_attention_heads": 40,
                "intermediate_size": 13824,
                "bias": False,
            },
            20_088_714_240,
        ),
    ],
    ids=["7B", "20B"],
)
def test_full_size_model_has_the_number_of_parameters_counted_from_its_structure(sizes, num_parameters):
    with torch.device("meta"):
        model = InternLMForCausalLM(InternLMConfig(**sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_saved_config_has_the_official_keys_and_an_old_rotary_buffer_loads(build, tmp_path):
    model = build(rotary={"base": 100, "type": "dynamic"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["bias"] is True and config["rotary"] == {"base": 100, "type": "dynamic"}
    assert not {"attention_bias", "mlp_bias", "rope_parameters"} & config.keys()
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = InternLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(3, 9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"rotary": {"base": 0}}, "rotary base is 0; it must be a number"),
        ({"rotary": {"type": "linear"}}, "rotary type is 'linear'; InternLM has 'origin' or 'dynamic'"),
    ],
)
def test_contradicting_keys_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        InternLMConfig(**{**TEXT, **changes})


def test_no_padding_is_written_as_minus_one_officially():
    assert InternLMConfig(**{**TEXT, "pad_token_id": -1}).pad_token_id is None


@pytest.fixture
def folder(tmp_path: Path, write_sentencepiece) -> Path:
    write_sentencepiece(tmp_path, "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>")
    (tmp_path / "config.json").write_text(json.dumps({**TEXT, "vocab_size": 900, "bias": True}))
    return tmp_path


def test_a_conversation_becomes_the_models_prompt(folder):
    processor = InternLMProcessor.from_folder(folder)
    history = [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "Yes."}]
    inputs = processor([*history, {"role": "user", "content": "Where?"}])
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_id
    text = processor.tokenizer.decode(ids[1:], skip_special_tokens=False)
    assert text == "<|User|>:A cat?\n<|Bot|>:Yes.<TOKENS_UNUSED_1>\n<|User|>:Where?\n<|Bot|>:"
    assert processor.tokenizer.stop_ids == tuple(
        [processor.tokenizer.eos_id, *(processor.tokenizer.id_of(name) for name in ("<eoh>", "<eoa>"))]
    )


def test_a_text_model_takes_no_images(folder):
    with pytest.raises(ValueError, match="text-only model"):
        InternLMProcessor.from_folder(folder)("What?", Image.new("RGB", (4, 4)))


def test_another_familys_tokenizer_is_refused(folder, write_sentencepiece):
    write_sentencepiece(folder, "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]")
    missing = "not <TOKENS_UNUSED_0>, <TOKENS_UNUSED_1>: it is not the tokenizer of a first InternLM"
    with pytest.raises(SourceError, match=missing):
        InternLMProcessor.from_folder(folder)
