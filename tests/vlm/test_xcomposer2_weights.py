"""Names, shapes and numbers of InternLM-XComposer2's weights, and what saving and loading make of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.internlm_xcomposer2.configuration import InternLMXComposer2Config
from vlm.internlm_xcomposer2.modeling import InternLMXComposer2ForCausalLM

VISION_PREFIX = "vit.vision_tower.vision_model."
LAYER_NAMES = {
    "attention.wqkv.weight",
    "attention.wqkv.Plora_A.weight",
    "attention.wqkv.Plora_B.weight",
    "attention.wo.weight",
    "attention.wo.Plora_A.weight",
    "attention.wo.Plora_B.weight",
    "feed_forward.w1.weight",
    "feed_forward.w1.Plora_A.weight",
    "feed_forward.w1.Plora_B.weight",
    "feed_forward.w3.weight",
    "feed_forward.w3.Plora_A.weight",
    "feed_forward.w3.Plora_B.weight",
    "feed_forward.w2.weight",
    "feed_forward.w2.Plora_A.weight",
    "feed_forward.w2.Plora_B.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
}
VISION_LAYER_NAMES = {
    f"{module}.{part}"
    for part in ("weight", "bias")
    for module in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    )
}


@pytest.mark.parametrize(("img_size", "num_parameters"), [(490, 8_666_840_064), (224, 8_665_847_808)])
def test_full_size_model_has_the_published_number_of_parameters(img_size, num_parameters):
    with torch.device("meta"):
        full_size = InternLMXComposer2ForCausalLM(InternLMXComposer2Config(img_size=img_size))
    assert sum(parameter.numel() for parameter in full_size.parameters()) == num_parameters


def test_parameters_have_the_official_names(xcomposer2):
    names = {
        "model.tok_embeddings.weight",
        *(f"model.layers.{index}.{name}" for index in (0, 1) for name in LAYER_NAMES),
        "model.norm.weight",
        "output.weight",
        f"{VISION_PREFIX}embeddings.class_embedding",
        f"{VISION_PREFIX}embeddings.patch_embedding.weight",
        f"{VISION_PREFIX}embeddings.position_embedding.weight",
        *(
            f"{VISION_PREFIX}{norm}.{part}"
            for norm in ("pre_layrnorm", "post_layernorm")
            for part in ("weight", "bias")
        ),
        *(f"{VISION_PREFIX}encoder.layers.{index}.{name}" for index in (0, 1) for name in VISION_LAYER_NAMES),
        *(f"vision_proj.{index}.{part}" for index in (0, 2) for part in ("weight", "bias")),
    }
    assert {name for name, _ in xcomposer2.named_parameters()} == names


def test_low_rank_weights_have_the_official_shapes(xcomposer2):
    wqkv, w2 = xcomposer2.model.layers[0].attention.wqkv, xcomposer2.model.layers[0].feed_forward.w2
    assert [tuple(part.weight.shape) for part in (wqkv, wqkv.Plora_A, wqkv.Plora_B)] == [(64, 32), (4, 32), (64, 4)]
    assert [tuple(part.weight.shape) for part in (w2, w2.Plora_A, w2.Plora_B)] == [(32, 48), (4, 48), (32, 4)]


def test_official_device_map_keys_cover_every_tensor(xcomposer2):
    keys = (
        "vit.",
        "vision_proj.",
        "model.tok_embeddings.",
        "model.layers.0.",
        "model.layers.1.",
        "model.norm.",
        "output.",
    )
    tensors = [*xcomposer2.named_parameters(), *xcomposer2.named_buffers()]
    assert [name for name, _ in tensors if not name.startswith(keys)] == []


def test_only_buffer_is_clips_own(xcomposer2):
    assert [name for name, _ in xcomposer2.named_buffers()] == [f"{VISION_PREFIX}embeddings.position_ids"]


def test_first_parameter_is_the_embedding_as_in_the_official_model(xcomposer2):
    """`model.device` reads it, and generate moves inputs there."""
    assert next(iter(xcomposer2.named_parameters()))[0] == "model.tok_embeddings.weight"


def test_modules_that_stay_whole_exist_by_the_names_they_are_listed_under(xcomposer2):
    classes = {type(module).__name__ for module in xcomposer2.modules()}
    assert {"InternLM2DecoderLayer", "CLIPEncoderLayer"} <= set(xcomposer2._no_split_modules) <= classes


def test_saved_and_loaded_twice_the_names_stay_official(xcomposer2, tmp_path):
    xcomposer2.save_pretrained(tmp_path / "first")
    loaded = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    weights = load_file(tmp_path / "second" / "model.safetensors")
    assert weights.keys() == dict(xcomposer2.named_parameters()).keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in xcomposer2.named_parameters())


def test_checkpoint_without_the_unused_norm_loads_completely(xcomposer2, tmp_path):
    xcomposer2.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if "post_layernorm" not in name}
    assert len(weights) == len(load_file(path)) - 2
    save_file(weights, path, metadata={"format": "pt"})
    loaded, report = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = {"input_ids": torch.tensor([[5, 39, 39, 39, 39, 6]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    assert torch.equal(loaded(**inputs).logits, xcomposer2(**inputs).logits)
