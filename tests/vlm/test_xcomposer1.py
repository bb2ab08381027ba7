"""The first InternLM-XComposer against transformers' BLIP-2 vision, Q-Former and Llama with converted weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from planner.errors import SourceError
from vlm.convert import convert_checkpoint
from vlm.internlm_xcomposer.configuration import InternLMXComposerConfig
from vlm.internlm_xcomposer.modeling import InternLMXComposerForCausalLM
from vlm.internlm_xcomposer.processing import XComposerProcessor

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QFORMER = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
}
# Rank and alpha differ, so that a forgotten scale shows.
LORA = {"freeze": False, "learn_param": ["q", "v", "ffn"], "lora_r": 4, "lora_alpha": 6, "lora_dropout": 0.05}
TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_query_token": 3,
    "internlm_lora": LORA,
    "image_token_id": 39,
    "vision_config": VISION,
    "qformer_config": QFORMER,
    "pad_token_id": -1,
    "eos_token_id": None,
}
IMAGE = [39] * 5
LAYER_NAMES = {"blocks": "encoder.layers", "attn.proj": "self_attn.projection", "attn.qkv": "self_attn.qkv"}
RELEASED = {"internlm_lora": {**LORA, "lora_r": 256, "lora_alpha": 256}}


@pytest.fixture
def build(randomised):
    def model_with(**changes) -> InternLMXComposerForCausalLM:
        return randomised(InternLMXComposerForCausalLM(InternLMXComposerConfig(**{**TINY, **changes})))

    return model_with


def part(model, prefix):
    return {name.removeprefix(prefix): t for name, t in model.state_dict().items() if name.startswith(prefix)}


def as_blip2_vision(model):
    """transformers' BLIP-2 vision model with the same weights, `ln_vision` as the norm that it ends with."""
    converted = {}
    for name, tensor in part(model, "visual_encoder.").items():
        for old, new in (*LAYER_NAMES.items(), ("norm", "layer_norm")):
            name = name.replace(old, new)
        converted[name] = tensor
    for layer in (0, 1):
        at = f"encoder.layers.{layer}."
        query, value = (converted.pop(f"{at}attn.{side}_bias") for side in "qv")
        converted[f"{at}self_attn.qkv.bias"] = torch.cat([query, torch.zeros(16), value])
    converted["embeddings.class_embedding"] = converted.pop("cls_token")
    converted["embeddings.position_embedding"] = converted.pop("pos_embed")
    for name in ("weight", "bias"):
        converted[f"embeddings.patch_embedding.{name}"] = converted.pop(f"patch_embed.proj.{name}")
        converted[f"post_layernorm.{name}"] = model.state_dict()[f"ln_vision.{name}"]
    vision = Blip2VisionModel(Blip2VisionConfig(**VISION, attn_implementation="eager")).eval()
    vision.load_state_dict(converted)
    vision.post_layernorm.eps = 1e-5
    return vision


def as_blip2_qformer(model):
    converted = {}
    for name, tensor in part(model, "Qformer.bert.").items():
        name = name.replace("attention.self.", "attention.attention.")
        converted[name.replace("embeddings.LayerNorm", "layernorm")] = tensor
    qformer = Blip2QFormerModel(Blip2QFormerConfig(**QFORMER, attn_implementation="eager")).eval()
    qformer.load_state_dict(converted)
    return qformer


def as_llama(model):
    """transformers' Llama with the LoRA products added to the weights."""
    weights = part(model, "internlm_model.")
    merged = {}
    for name, tensor in weights.items():
        if "lora_" in name:
            continue
        stem = name.removesuffix(".weight")
        down, up = (weights.get(f"{stem}.lora_{side}.weight") for side in "AB")
        merged[name] = tensor if down is None else tensor + 1.5 * up @ down
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(**{key: TINY[key] for key in sizes}, rms_norm_eps=1e-5, attention_bias=True)
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(merged)
    return llama


def reference_features(model, pixels):
    seen = as_blip2_qformer(model)(
        query_embeds=model.query_tokens.expand(len(pixels), -1, -1),
        encoder_hidden_states=as_blip2_vision(model)(pixels).last_hidden_state,
    ).last_hidden_state
    projected = F.linear(seen, model.internlm_proj.weight, model.internlm_proj.bias)
    ends = (end.expand(len(pixels), -1, -1) for end in (model.flag_image_start, model.flag_image_end))
    return torch.cat([next(ends), projected, next(ends)], dim=1)


def token_ids(*shape, seed=0):
    return torch.randint(3, 39, shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def prompt(*parts):
    return torch.tensor([[token for part in parts for token in part]])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_vision_features_equal_blip2s_with_converted_weights(build, attention):
    model = build(attn_implementation=attention)
    assert model.visual_encoder.blocks[0].attn.config._attn_implementation == attention
    pixels = images(2)
    features = model.ln_vision(model.visual_encoder(pixels))
    torch.testing.assert_close(features, as_blip2_vision(model)(pixels).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_image_features_equal_blip2s_qformer_between_beginning_and_end(build, attention):
    model, pixels = build(attn_implementation=attention), images(2)
    features = model.get_image_features(pixels).last_hidden_state
    assert features.shape == (2, 5, 32)
    torch.testing.assert_close(features, reference_features(model, pixels), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_logits_equal_llama_with_merged_lora(build):
    model, input_ids = build(), token_ids(2, 9)
    torch.testing.assert_close(model(input_ids).logits, as_llama(model)(input_ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_image_prompt_equals_llama_on_joined_embeddings(build):
    model, pixels = build(), images(2)
    ids = prompt([5, 6], IMAGE, [7], IMAGE, [8])
    joined = model.get_input_embeddings()(ids)
    joined[0, 2:7], joined[0, 8:13] = reference_features(model, pixels)
    expected = as_llama(model)(inputs_embeds=joined).logits
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_left_padded_batch_generates_the_tokens_each_sample_generates_alone(build, num_beams):
    model, pixels = build(), images(3)
    samples = prompt([5], IMAGE, [6], IMAGE, [7]), prompt(IMAGE, [8, 9])
    padding = samples[0].shape[1] - samples[1].shape[1]
    batch = torch.cat([samples[0], F.pad(samples[1], (padding, 0), value=2)])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    together = model.generate(batch, attention_mask=mask, pixel_values=pixels, **settings)
    for sample, generated, own in zip(samples, together, (pixels[:2], pixels[2:]), strict=True):
        alone = model.generate(sample, pixel_values=own, **settings)
        assert torch.equal(generated[batch.shape[1] :], alone[0, sample.shape[1] :])


def test_generate_gives_the_tokens_of_steps_without_cache(build):
    inputs, ids = {"pixel_values": images(1)}, prompt([5], IMAGE, [6])
    model, settings = build(), {"max_new_tokens": 5, "do_sample": False}
    without = model.generate(ids, use_cache=False, **inputs, **settings)
    assert torch.equal(without, model.generate(ids, **inputs, **settings))


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed_in_the_models_dtype(build):
    model = build()
    ids = token_ids(2, 6)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    assert model.bfloat16()(prompt(IMAGE, [5]), pixel_values=images(1)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("vocab_size", "num_parameters", "total_size"),
    [(103170, 8_797_888_384, 18_577_229_056), (103168, 8_797_872_000, 18_577_196_288)],
    ids=["VL-7B", "7B"],
)
def test_full_size_model_has_the_published_number_of_keys_and_bytes(vocab_size, num_parameters, total_size):
    """Source: the released pytorch_model.bin.index.json, 1480 keys and `total_size`.

    The vision encoder's linear layers and convolution, and the language model but for its LoRA, are stored in 16 bits,
    the rest in 32. Beside parameters a checkpoint has a rotary buffer per layer, in 16 bits, and the Q-Former's
    position ids.
    """
    with torch.device("meta"):
        model = InternLMXComposerForCausalLM(InternLMXComposerConfig(vocab_size=vocab_size, **RELEASED))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == num_parameters
    products = (nn.Linear, nn.Conv2d)
    encoder = {f"visual_encoder.{name}." for name, m in model.visual_encoder.named_modules() if isinstance(m, products)}
    halves = {
        name
        for name in sizes
        if (name.startswith("internlm_model.") and ".lora_" not in name) or name.rpartition(".")[0] + "." in encoder
    }
    stored = sum(size * (2 if name in halves else 4) for name, size in sizes.items())
    assert stored + 32 * 64 * 2 + 512 * 8 == total_size
    assert len(sizes) + 32 + 1 == 1480


def test_parameters_have_the_official_names(build):
    def both(*names):
        return {f"{name}.{part}" for name in names for part in ("weight", "bias")}

    block = {
        "attn.qkv.weight",
        "attn.q_bias",
        "attn.v_bias",
        *both("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2"),
    }
    attention = both("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    rest = both("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")
    layer = {
        *both(*(f"self_attn.{side}_proj" for side in "qkvo")),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")),
        *(f"{name}.lora_{side}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj") for side in "AB"),
        *(f"mlp.{name}_proj.lora_{side}.weight" for name in ("up", "down") for side in "AB"),
    }
    expected = {
        *("query_tokens", "flag_image_start", "flag_image_end", "visual_encoder.cls_token", "visual_encoder.pos_embed"),
        *both("visual_encoder.patch_embed.proj", "ln_vision", "Qformer.bert.embeddings.LayerNorm", "internlm_proj"),
        *(f"visual_encoder.blocks.{index}.{name}" for index in (0, 1) for name in block),
        *(f"Qformer.bert.encoder.layer.{index}.attention.{name}" for index in (0, 1, 2) for name in attention),
        *(f"Qformer.bert.encoder.layer.{index}.crossattention.{name}" for index in (0, 2) for name in attention),
        *(f"Qformer.bert.encoder.layer.{index}.{name}" for index in (0, 1, 2) for name in rest),
        *(f"internlm_model.model.layers.{index}.{name}" for index in (0, 1) for name in layer),
        *(f"internlm_model.{name}.weight" for name in ("model.embed_tokens", "model.norm", "lm_head")),
    }
    assert {name for name, _ in build().named_parameters()} == expected


def test_checkpoint_with_the_official_buffers_loads_completely(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["internlm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = InternLMXComposerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, pixels = prompt(IMAGE, [5]), images(1)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


def test_official_pickles_of_two_dtypes_are_converted_and_load(build, tmp_path):
    model = build()
    (tmp_path / "official").mkdir()
    model.config.save_pretrained(tmp_path / "official")
    weights = {
        name: tensor.half() if name.startswith("internlm_model.") and ".lora_" not in name else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    weights["internlm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4).half()
    weights["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(weights, tmp_path / "official" / "pytorch_model.bin")
    convert_checkpoint(tmp_path / "official", tmp_path / "converted")
    loaded = InternLMXComposerForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    ids, pixels = prompt(IMAGE, [5]), images(1)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


def test_a_model_without_lora_has_none(build):
    assert not [name for name, _ in build(internlm_lora=None).named_parameters() if "lora" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_query_token": 0}, "num_query_token is 0"),
        ({"internlm_lora": {"learn_param": ["q"], "lora_alpha": 4}}, "internlm_lora: lora_r is None"),
        ({"internlm_lora": {**LORA, "learn_param": ["gate"]}}, "learn_param has gate; known are q, k, v, o, ffn"),
        ({"intern_converted_llm": False}, "intern_converted_llm is False; every model of this family has True"),
        (
            {"vision_config": {**VISION, "patch_size": 5}},
            "vision_config: image_size 16 is not a multiple of patch_size",
        ),
        ({"qformer_config": {**QFORMER, "encoder_hidden_size": 8}}, "encoder_hidden_size 8 is not .* hidden_size 16"),
        ({"image_token_id": 40}, "image_token_id 40 is outside of vocab_size 40"),
    ],
)
def test_contradicting_keys_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        InternLMXComposerConfig(**{**TINY, **changes})


@pytest.fixture
def folder(tmp_path: Path, write_sentencepiece) -> Path:
    """A small tokenizer of the family, and a config like the official one."""
    write_sentencepiece(tmp_path, *(f"<TOKENS_UNUSED_{number}>" for number in range(3)))
    config = {key: value for key, value in TINY.items() if key != "image_token_id"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 900}))
    return tmp_path


def test_a_question_with_an_image_becomes_the_models_prompt(folder):
    processor = XComposerProcessor.from_folder(folder)
    inputs = processor("What is this?", Image.new("RGB", (30, 20), "red"))
    text = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=False)
    image = "<TOKENS_UNUSED_2>" * 5
    assert text == f"<s> <|User|>:{image}What is this?\n<TOKENS_UNUSED_0> <|Bot|>:"
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, r"the tokenizer has \d+ ids, but vocab_size in config.json is 300"),
        ({"num_query_token": 0}, "config.json: InternLMXComposerConfig: num_query_token is 0"),
    ],
)
def test_a_config_that_does_not_fit_the_tokenizer_or_itself_is_refused(folder, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SourceError, match=message):
        XComposerProcessor.from_folder(folder)
