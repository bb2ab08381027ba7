"""Qwen and Qwen-VL against transformers' Llama and a slow vision encoder, and against themselves run otherwise."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from vlm.qwen.configuration import QWenConfig
from vlm.qwen.modeling import QWenLMHeadModel, query_scale, stretched_bases
from vlm.qwen.vision import places_for

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "intermediate_size": 96,
    "rotary_emb_base": 100,
    "seq_length": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "eos_token_id": None,
}
# 16 px in patches of 4: sixteen patches, at four learned places that are interpolated, seen by four queries.
VISUAL = {
    "image_size": 16,
    "patch_size": 4,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 1.55,
    "output_dim": 32,
    "n_queries": 4,
    "image_start_id": 37,
}
IMAGE = [37, 39, 39, 39, 39, 38]
LLAMA_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
}


@pytest.fixture
def build(randomised):
    def model_with(visual=None, **changes) -> QWenLMHeadModel:
        return randomised(QWenLMHeadModel(QWenConfig(**{**TEXT, "visual": visual, **changes})))

    return model_with


def as_llama(model, rotary_base=100.0):
    """transformers' Llama with the same weights: the packed projection taken apart, no bias after attention."""
    converted = {}
    for name, tensor in model.state_dict().items():
        for old, new in LLAMA_NAMES.items():
            name = name.replace(old, new)
        if "attn.c_attn" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split(32), strict=True)
            converted |= {name.replace("attn.c_attn", f"self_attn.{part}"): rows for part, rows in parts}
        elif "visual" not in name:
            converted[name] = tensor
    converted |= {f"model.layers.{index}.self_attn.o_proj.bias": torch.zeros(32) for index in (0, 1)}
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=rotary_base,
        attention_bias=True,
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(converted)
    return llama


def token_ids(*shape, seed=0):
    return torch.randint(3, 37, shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def prompt(*parts):
    return torch.tensor([[token for part in parts for token in part]])


def left_padded(first, second):
    padding = first.shape[1] - second.shape[1]
    batch = torch.cat([first, F.pad(second, (padding, 0), value=2)])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    return batch, mask


def slow_features(model, image):
    """Features of one image (4, 32) by loops over patches and heads, from the weights alone."""
    weights = {n.removeprefix("transformer.visual."): t for n, t in model.state_dict().items() if ".visual." in n}

    def norm(name, rows):
        centred = rows - rows.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(name, rows):
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def places(name):
        square = weights[name].view(1, 2, 2, -1).permute(0, 3, 1, 2)
        return F.interpolate(square, size=(4, 4), mode="bicubic").permute(0, 2, 3, 1).reshape(16, -1)

    kernel = weights["conv1.weight"].flatten(1)
    patches = [image[:, y : y + 4, x : x + 4].flatten() for y in range(0, 16, 4) for x in range(0, 16, 4)]
    hidden = norm("ln_pre", torch.stack([kernel @ patch for patch in patches]) + places("positional_embedding"))
    for layer in (0, 1):
        at = f"transformer.resblocks.{layer}."
        packed = linear(at + "attn.in_proj", norm(at + "ln_1", hidden))
        heads = []
        for head in (packed[:, :24], packed[:, 24:]):
            query, key, value = head.split(8, dim=-1)
            heads.append((query @ key.T / 8**0.5).softmax(-1) @ value)
        hidden = hidden + linear(at + "attn.out_proj", torch.cat(heads, dim=-1))
        hidden = hidden + linear(at + "mlp.c_proj", F.gelu(linear(at + "mlp.c_fc", norm(at + "ln_2", hidden))))
    value = norm("attn_pool.ln_kv", hidden @ weights["attn_pool.kv_proj.weight"].T)
    key = value + places("attn_pool.pos_embed")
    query = norm("attn_pool.ln_q", weights["attn_pool.query"]) + weights["attn_pool.pos_embed"]
    projections = zip(
        weights["attn_pool.attn.in_proj_weight"].split(32),
        weights["attn_pool.attn.in_proj_bias"].split(32),
        strict=True,
    )
    query, key, value = (rows @ w.T + b for rows, (w, b) in zip((query, key, value), projections, strict=True))
    mixed = (query @ key.T / 32**0.5).softmax(-1) @ value
    return norm("ln_post", linear("attn_pool.attn.out_proj", mixed)) @ weights["proj"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_text_logits_equal_llama_with_converted_weights(build, attention):
    model = build(attn_implementation=attention)
    input_ids = token_ids(2, 11)
    torch.testing.assert_close(model(input_ids).logits, as_llama(model)(input_ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("length", "alpha"), [(32, 1), (33, 3), (64, 3), (65, 7)])
@torch.no_grad()
def test_a_long_prompt_turns_by_the_stretched_base(build, length, alpha):
    """alpha is 2 ** ceil(log2(length / 32) + 1) - 1, and the base grows by its power 8 / 6."""
    model = build(use_logn_attn=False)
    input_ids = token_ids(1, length)
    llama = as_llama(model, rotary_base=100 * alpha ** (8 / 6))
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_the_base_of_a_padded_batch_follows_each_samples_own_length():
    config = QWenConfig(**TEXT)
    positions = torch.stack([(torch.arange(70) - padding).clamp(min=0) for padding in (0, 10, 50)])
    assert stretched_bases(config, positions) == pytest.approx([100 * alpha ** (8 / 6) for alpha in (7, 3, 1)])


def test_queries_beyond_the_trained_length_grow_with_its_logarithm():
    scale = query_scale(torch.tensor([[0, 31, 32, 1023]]), 32).flatten().tolist()
    assert scale == pytest.approx([1, 1, math.log(33, 32), 2])


@torch.no_grad()
def test_scaled_queries_equal_llama_whose_query_weights_are_scaled(build):
    """One query at position 63 of a trained length of 32: its scale can be put into the weights."""
    model = build(use_dynamic_ntk=False)
    first = model(token_ids(1, 63))
    logits = model(token_ids(1, 1, seed=1), past_key_values=first.past_key_values).logits
    plain, scaled = as_llama(model), as_llama(model)
    for layer in scaled.model.layers:
        for parameter in (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias):
            parameter.mul_(math.log(64, 32))
    cache = model(token_ids(1, 63)).past_key_values
    expected = scaled(token_ids(1, 1, seed=1), past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    cache = model(token_ids(1, 63)).past_key_values
    assert not torch.allclose(logits, plain(token_ids(1, 1, seed=1), past_key_values=cache).logits, atol=1e-3)


@torch.no_grad()
def test_steps_turn_by_the_base_that_their_cached_keys_were_turned_by(build):
    model = build(use_logn_attn=False)
    ids, more = token_ids(1, 40), token_ids(1, 30, seed=1)
    first = model(ids)
    other = model(token_ids(1, 5))  # in between: the base belongs to the cache, not to the model
    logits = model(more, past_key_values=first.past_key_values).logits
    llama = as_llama(model, rotary_base=100 * 3 ** (8 / 6))
    whole = llama(torch.cat([ids, more], dim=1)).logits
    torch.testing.assert_close(logits, whole[:, 40:], atol=1e-4, rtol=1e-4)
    short = as_llama(model)(torch.cat([token_ids(1, 5), more], dim=1)).logits
    torch.testing.assert_close(
        model(more, past_key_values=other.past_key_values).logits, short[:, 5:], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("lengths", [(9, 6), (50, 36)], ids=["short", "beyond the trained length"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_left_padded_batch_generates_the_tokens_each_sample_generates_alone(build, lengths, num_beams):
    model = build()
    samples = [token_ids(1, length, seed=length) for length in lengths]
    batch, mask = left_padded(*samples)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    together = model.generate(batch, attention_mask=mask, **settings)
    for sample, generated in zip(samples, together, strict=True):
        alone = model.generate(sample, **settings)
        assert torch.equal(generated[batch.shape[1] :], alone[0, sample.shape[1] :])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_image_features_equal_slow_loops_over_the_weights(build, attention):
    model = build(VISUAL, attn_implementation=attention)
    pixels = images(2)
    for image, own in zip(pixels, model.get_image_features(pixels).last_hidden_state, strict=True):
        torch.testing.assert_close(own, slow_features(model, image), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_image_prompt_equals_llama_on_embeddings_with_features_between_the_markers(build):
    model = build(VISUAL)
    pixels, ids = images(2), prompt([5, 6], IMAGE, [7], IMAGE, [8])
    joined = model.get_input_embeddings()(ids)
    joined[0, 3:7], joined[0, 10:14] = (slow_features(model, image) for image in pixels)
    expected = as_llama(model)(inputs_embeds=joined).logits
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_images_go_with_their_sample(build, num_beams):
    model, pixels = build(VISUAL), images(3)
    samples = prompt([5], IMAGE, [6], IMAGE, [7]), prompt(IMAGE, [8, 9])
    batch, mask = left_padded(*samples)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    together = model.generate(batch, attention_mask=mask, pixel_values=pixels, **settings)
    for sample, generated, own in zip(samples, together, (pixels[:2], pixels[2:]), strict=True):
        alone = model.generate(sample, pixel_values=own, **settings)
        assert torch.equal(generated[batch.shape[1] :], alone[0, sample.shape[1] :])


def test_places_that_fit_are_taken_as_they_are():
    places = torch.randn(16, 3)
    assert places_for(places, 16) is places


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed_in_the_models_dtype(build):
    model = build(VISUAL)
    ids = token_ids(2, 6)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])
    half = model.bfloat16()(prompt(IMAGE, [5]), pixel_values=images(1))
    assert half.logits.dtype == torch.bfloat16


def test_images_that_do_not_match_or_cannot_be_seen_are_refused(build):
    with pytest.raises(ValueError, match="4 image positions, but 2 images of 4"):
        build(VISUAL)(prompt([5], IMAGE), pixel_values=images(2))
    with pytest.raises(ValueError, match="has no `visual` in its config"):
        build().get_image_features(images(1))


@pytest.mark.parametrize(
    ("changes", "num_parameters"), [({}, 7_721_324_544), ({"visual": {}}, 9_656_935_168)], ids=["Qwen-7B", "Qwen-VL"]
)
def test_full_size_model_has_the_published_number_of_parameters(changes, num_parameters):
    with torch.device("meta"):
        model = QWenLMHeadModel(QWenConfig(**changes))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    visual = [p.numel() for name, p in model.named_parameters() if ".visual." in name]
    assert sum(visual) == (1_935_610_624 if changes else 0)


def test_parameters_have_the_official_names(build):
    layer = ("ln_1.weight", "ln_2.weight", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight")
    layer += ("mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight")
    block = ("ln_1", "ln_2", "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    pool = ("pos_embed", "query", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias")
    both = ("ln_pre", "ln_post", "attn_pool.ln_q", "attn_pool.ln_kv", "attn_pool.attn.out_proj")
    visual = {
        *("conv1.weight", "positional_embedding", "proj"),
        *(f"attn_pool.{name}" for name in pool),
        *(f"{name}.{part}" for name in both for part in ("weight", "bias")),
        *(f"transformer.resblocks.{i}.{name}.{part}" for i in (0, 1) for name in block for part in ("weight", "bias")),
    }
    expected = {
        *("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"),
        *(f"transformer.h.{index}.{name}" for index in (0, 1) for name in layer),
        *(f"transformer.visual.{name}" for name in visual),
    }
    model = build(VISUAL)
    assert {name for name, _ in model.named_parameters()} == expected
    assert list(model.named_buffers()) == []


def test_saved_and_loaded_it_gives_the_same_logits(build, tmp_path):
    model = build(VISUAL)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen" and config["visual"]["width"] == 16 and config["kv_channels"] == 8
    loaded = QWenLMHeadModel.from_pretrained(tmp_path)
    ids, pixels = prompt([5], IMAGE, [6]), images(1)
    assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number"),
        ({"intermediate_size": 95}, "intermediate_size is 95; it must be even"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5; every model of this family has 1.0"),
        ({"rotary_emb_base": "x"}, "rotary_emb_base is 'x'"),
        ({"seq_length": 1}, "seq_length is 1"),
        ({"visual": {**VISUAL, "heads": 3}}, "visual: width 16 is not a multiple of heads 3"),
        ({"visual": {**VISUAL, "n_queries": 5}}, "visual: n_queries is 5; .* square"),
        ({"visual": {**VISUAL, "output_dim": 16}}, "visual: output_dim 16 is not hidden_size 32"),
        ({"visual": {**VISUAL, "image_start_id": 38}}, "image_start_id 38 and the two ids after it are not all below"),
    ],
)
def test_contradicting_keys_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        QWenConfig(**{**TEXT, **changes})
