"""GLM-4-9B and GLM-4V-9B against transformers' Glm and a slow vision encoder, and against themselves run otherwise."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GlmConfig, GlmForCausalLM

from planner.errors import SourceError
from vlm.chatglm.configuration import ChatGLMConfig
from vlm.chatglm.modeling import ChatGLMForConditionalGeneration
from vlm.chatglm.processing import ChatGLMProcessor
from vlm.chatglm.tokenization import SPECIALS

TEXT = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "padded_vocab_size": 40,
    "rope_ratio": 0.01,
    "seq_length": 64,
    "pad_token_id": 2,
    "boi_token_id": 39,
    "eoi_token_id": 38,
}
# 16 px in patches of 4: four squares of four patches, and a beginning and an end.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_positions": 17,
    "scaling_factor": 4,
}
IMAGE = [39] * 6
GLM_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.": "model.",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


@pytest.fixture
def build(randomised):
    def model_with(vision=VISION, **changes) -> ChatGLMForConditionalGeneration:
        return randomised(
            ChatGLMForConditionalGeneration(ChatGLMConfig(**{**TEXT, "vision_config": vision, **changes}))
        )

    return model_with


def as_glm(model):
    """transformers' Glm with the same weights: the packed projection taken apart, the rest renamed."""
    converted = {}
    for name, tensor in model.state_dict().items():
        for old, new in GLM_NAMES.items():
            name = name.replace(old, new)
        if "query_key_value" in name and "vision" not in name:
            query, key, value = tensor.split([32, 16, 16])
            parts = {"q_proj": query, "k_proj": key, "v_proj": value}
            converted |= {name.replace("self_attention.query_key_value", f"self_attn.{p}"): t for p, t in parts.items()}
        elif "vision" not in name:
            converted[name] = tensor
    config = GlmConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=model.config.layernorm_epsilon,
        rope_theta=100.0,
        partial_rotary_factor=0.5,
        attention_bias=True,
        pad_token_id=2,
        attn_implementation="eager",
    )
    glm = GlmForCausalLM(config).eval()
    glm.load_state_dict(converted)
    return glm


def token_ids(*shape, seed=0):
    return torch.randint(3, 38, shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def prompt(*parts):
    return torch.tensor([[token for part in parts for token in part]])


def slow_features(model, image):
    """Features of one image (6, 32) by loops over patches, heads and squares, from the weights alone."""
    weights = {n.removeprefix("transformer.vision."): t for n, t in model.state_dict().items() if ".vision." in n}

    def linear(name, rows):
        bias = weights.get(f"{name}.bias")
        return rows @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(name, rows, eps=1e-6):
        centred = rows - rows.mean(-1, keepdim=True)
        return (
            centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    kernel = weights["patch_embedding.proj.weight"].flatten(1)
    patches = [image[:, y : y + 4, x : x + 4].flatten() for y in range(0, 16, 4) for x in range(0, 16, 4)]
    rows = torch.stack([kernel @ patch + weights["patch_embedding.proj.bias"] for patch in patches])
    hidden = (
        torch.cat([weights["patch_embedding.cls_embedding"], rows])
        + weights["patch_embedding.position_embedding.weight"]
    )
    for layer in (0, 1):
        at = f"transformer.layers.{layer}."
        query, key, value = linear(at + "attention.query_key_value", hidden).split(16, dim=-1)
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            heads.append((query[:, head] @ key[:, head].T / 8**0.5).softmax(-1) @ value[:, head])
        hidden = hidden + norm(at + "input_layernorm", linear(at + "attention.dense", torch.cat(heads, dim=-1)))
        inner = linear(at + "mlp.fc2", F.gelu(linear(at + "mlp.fc1", hidden)))
        hidden = hidden + norm(at + "post_attention_layernorm", inner)
    grid = hidden[1:].view(4, 4, 16)
    squares = [grid[y : y + 2, x : x + 2].permute(2, 0, 1).flatten() for y in (0, 2) for x in (0, 2)]
    merged = torch.stack(squares) @ weights["conv.weight"].flatten(1).T + weights["conv.bias"]
    merged = F.gelu(norm("linear_proj.norm1", linear("linear_proj.linear_proj", merged), eps=1e-5))
    gate = linear("linear_proj.gate_proj", merged)
    merged = linear("linear_proj.dense_4h_to_h", gate * gate.sigmoid() * linear("linear_proj.dense_h_to_4h", merged))
    return torch.cat([weights["boi"][0], merged, weights["eoi"][0]]) / 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_text_logits_equal_transformers_glm_with_converted_weights(build, attention):
    model = build(attn_implementation=attention)
    input_ids = token_ids(2, 11)
    torch.testing.assert_close(model(input_ids).logits, as_glm(model)(input_ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_image_features_equal_slow_loops_over_the_weights(build, attention):
    model = build(attn_implementation=attention)
    assert model.transformer.vision.transformer.layers[0].attention.config._attn_implementation == attention
    pixels = images(2)
    features = model.get_image_features(pixels).last_hidden_state
    for image, own in zip(pixels, features, strict=True):
        torch.testing.assert_close(own, slow_features(model, image), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_image_prompt_equals_glm_on_joined_embeddings_with_shared_positions(build):
    model = build()
    pixels, ids = images(2), prompt([5, 6], IMAGE, [7], IMAGE, [8])
    joined = model.get_input_embeddings()(ids)
    joined[0, 2:8], joined[0, 9:15] = (slow_features(model, image) for image in pixels)
    positions = torch.tensor([[0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 7, 7, 7, 8, 9]])
    expected = as_glm(model)(inputs_embeds=joined, position_ids=positions).logits
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_steps_after_an_image_go_on_from_its_end(build):
    model, pixels = build(), images(1)
    ids = prompt([5], IMAGE, [7])
    generated = model.generate(ids, pixel_values=pixels, max_new_tokens=5, do_sample=False)
    for _ in range(5):
        logits = model(ids, pixel_values=pixels, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_a_second_question_goes_on_from_the_cache_of_the_first(build):
    model, pixels, ids = build(), images(1), prompt([5], IMAGE, [7])
    settings = {"max_new_tokens": 4, "do_sample": False}
    first = model.generate(ids, pixel_values=pixels, return_dict_in_generate=True, **settings)
    longer = torch.cat([first.sequences, prompt([8, 9])], dim=1)
    expected = model.generate(longer, pixel_values=pixels, **settings)
    assert torch.equal(model.generate(longer, past_key_values=first.past_key_values, **settings), expected)


def test_a_step_without_position_ids_is_refused_where_images_may_have_shared_some(build):
    first = build()(token_ids(1, 4))
    with pytest.raises(ValueError, match="position_ids are missing: 4 positions are cached"):
        build()(token_ids(1, 1), past_key_values=first.past_key_values)
    text = build(vision=None)
    assert text(token_ids(1, 1), past_key_values=text(token_ids(1, 4)).past_key_values).logits.shape == (1, 1, 40)


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


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed_in_the_models_dtype(build):
    model = build()
    ids = token_ids(2, 6)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    half = model.bfloat16()(prompt(IMAGE, [5]), pixel_values=images(1))
    assert half.logits.dtype == torch.bfloat16


def test_images_that_do_not_match_or_cannot_be_seen_are_refused(build):
    with pytest.raises(ValueError, match="6 image positions, but 2 images of 6"):
        build()(prompt([5], IMAGE), pixel_values=images(2))
    with pytest.raises(ValueError, match="pixel_values go with input_ids alone"):
        build()(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=images(1))
    with pytest.raises(ValueError, match="has no vision_config"):
        build(vision=None).get_image_features(images(1))


def test_full_size_model_has_the_published_numbers_of_parameters():
    """Source: zai-org/GLM-4 issue 500, per part and in all."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(ChatGLMConfig(vision_config={}))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == 13_906_320_896
    assert sum(size for name, size in sizes.items() if ".encoder.layers." in name) == 8_158_433_280
    assert sum(size for name, size in sizes.items() if ".vision.transformer.layers." in name) == 4_279_387_392
    assert model.config.image_tokens == 1602


def test_parameters_have_the_official_names(build):
    norms = {f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
    attention = {
        "self_attention.query_key_value.weight",
        "self_attention.query_key_value.bias",
        "self_attention.dense.weight",
    }
    layer = norms | attention | {"mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"}
    eva = (
        "attention.query_key_value",
        "attention.dense",
        "mlp.fc1",
        "mlp.fc2",
        "input_layernorm",
        "post_attention_layernorm",
    )
    both = ("patch_embedding.proj", "conv", "linear_proj.norm1")
    projector = ("linear_proj", "gate_proj", "dense_h_to_4h", "dense_4h_to_h")
    vision = {
        *("boi", "eoi", "patch_embedding.cls_embedding", "patch_embedding.position_embedding.weight"),
        *(f"linear_proj.{name}.weight" for name in projector),
        *(f"{name}.{part}" for name in both for part in ("weight", "bias")),
        *(f"transformer.layers.{i}.{name}.{part}" for i in (0, 1) for name in eva for part in ("weight", "bias")),
    }
    expected = {
        *("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"),
        "transformer.encoder.final_layernorm.weight",
        *(f"transformer.encoder.layers.{index}.{name}" for index in (0, 1) for name in layer),
        *(f"transformer.vision.{name}" for name in vision),
    }
    model = build()
    assert {name for name, _ in model.named_parameters()} == expected
    assert list(model.named_buffers()) == []


def test_checkpoint_with_the_official_rotary_buffer_loads_completely(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.rotary_pos_emb.inv_freq"] = torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in TEXT} == TEXT and "vocab_size" not in config
    loaded, report = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, pixels = prompt(IMAGE, [5]), images(1)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be a whole number"),
        ({"multi_query_group_num": 3}, "num_attention_heads 4 is not a multiple of multi_query_group_num 3"),
        ({"kv_channels": 6}, "kv_channels is 6; .* 4 must divide it"),
        ({"rope_ratio": 0}, "rope_ratio is 0"),
        ({"rmsnorm": False}, "rmsnorm is False; every model of this family has True"),
        ({"boi_token_id": 40}, "boi_token_id 40 is outside of padded_vocab_size 40"),
        ({"vision_config": {**VISION, "num_positions": 16}}, "vision_config: num_positions is 16; .* are 17"),
        ({"vision_config": {**VISION, "num_heads": 3}}, "vision_config: hidden_size 16 is not a multiple of num_heads"),
        ({"vision_config": {**VISION, "scaling_factor": 0}}, "vision_config: scaling_factor is 0"),
    ],
)
def test_contradicting_keys_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ChatGLMConfig(**{**TEXT, "vision_config": VISION, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny vocabulary and config: 256 bytes and two tokens, then the special ones."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the"]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    first = len(tokens) + SPECIALS.index("<|begin_of_image|>")
    ids = {"padded_vocab_size": 300, "boi_token_id": first, "eoi_token_id": first + 1}
    (tmp_path / "config.json").write_text(json.dumps({**TEXT, **ids, "vision_config": VISION}))
    return tmp_path


def test_special_tokens_have_the_published_ids():
    """Source: the config of GLM-4V-9B, which begins an image with 151339 and ends it with 151340."""
    assert 151329 + SPECIALS.index("<|begin_of_image|>") == 151339
    assert 151329 + SPECIALS.index("<|end_of_image|>") == 151340
    assert [151329 + SPECIALS.index(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")] == [
        151329,
        151336,
        151338,
    ]


def test_a_question_with_an_image_becomes_the_models_prompt(folder):
    processor = ChatGLMProcessor.from_folder(folder)
    inputs = processor("the?", Image.new("RGB", (30, 20), "red"))
    names = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]
    mask, start, user, answer = (258 + SPECIALS.index(name) for name in names)
    expected = [mask, start, user, ord("\n"), *[268] * 6, 257, ord("?"), answer]
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["pixel_values"].shape == (1, 3, 16, 16)
    assert processor.decode([ord("\n"), 257, user, 257]) == "the"


def test_text_may_not_open_an_image(folder):
    processor = ChatGLMProcessor.from_folder(folder)
    with pytest.raises(ValueError, match="contains the control text '<|begin_of_image|>'".replace("|", r"\|")):
        processor("Look: <|begin_of_image|>")
    with pytest.raises(ValueError, match=r"contains the image token \(id 268, <\|begin_of_image\|>\)"):
        processor("Look: <|begin_of_image|>", chat=False)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("boi_token_id", 5, "boi_token_id is 5, but <.begin_of_image.> is 268"),
        ("padded_vocab_size", 270, "has 272 ids, but padded_vocab_size in config.json is 270"),
    ],
)
def test_a_config_of_another_tokenizer_is_refused(folder, key, value, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(SourceError, match=message):
        ChatGLMProcessor.from_folder(folder)


def test_a_saved_text_model_has_no_vision_config():
    assert "vision_config" not in ChatGLMConfig(**TEXT).to_dict()
