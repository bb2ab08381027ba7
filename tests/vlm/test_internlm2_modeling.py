"""The InternLM2 language model against transformers' Llama, against itself in other ways of running, and by name."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from vlm.internlm_xcomposer2.configuration import InternLM2Config
from vlm.internlm_xcomposer2.decoder import rotary_base
from vlm.internlm_xcomposer2.modeling import InternLM2ForCausalLM

LAYER_NAMES = {
    "attention.wqkv.weight": (64, 32),
    "attention.wo.weight": (32, 32),
    "feed_forward.w1.weight": (48, 32),
    "feed_forward.w3.weight": (48, 32),
    "feed_forward.w2.weight": (32, 48),
    "attention_norm.weight": (32,),
    "ffn_norm.weight": (32,),
}


@pytest.fixture
def build(internlm2_settings, randomised):
    def model_with(**changes) -> InternLM2ForCausalLM:
        return randomised(InternLM2ForCausalLM(InternLM2Config(**{**internlm2_settings, **changes})))

    return model_with


def token_ids(*shape, seed=0):
    """Random ids without padding, the end or the beginning."""
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy_without_cache(model, input_ids, num_steps, **inputs):
    for _ in range(num_steps):
        logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": None}, {"bias": True}],
    ids=["grouped", "one key/value head", "one per head", "biases"],
)
@torch.no_grad()
def test_logits_equal_llama_with_unpacked_weights(build, as_llama, changes, attention):
    model = build(attn_implementation=attention, **changes)
    llama = as_llama(model.state_dict(), model.config, attention=attention)
    input_ids = token_ids(2, 11)
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_with_gaps_are_taken_as_given(build, as_llama):
    model = build()
    llama = as_llama(model.state_dict(), model.config)
    inputs = {"attention_mask": torch.ones(1, 5, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 4, 9, 10]])}
    input_ids = token_ids(1, 5)
    torch.testing.assert_close(model(input_ids, **inputs).logits, llama(input_ids, **inputs).logits)


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("length", [16, 17, 40])
@torch.no_grad()
def test_rotary_positions_stretch_beyond_the_trained_length_as_in_llama(build, as_llama, length, factor):
    model = build(max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": factor})
    llama = as_llama(model.state_dict(), model.config)
    input_ids = token_ids(1, length)
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_rotary_base_follows_the_published_formula(internlm2_settings):
    config = InternLM2Config(
        **{**internlm2_settings, "max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2}}
    )
    assert rotary_base(config, 16) == 100
    # head width 8, and 2 * 72 / 16 - 1 is 8: 8 ** (8 / 6) is 16
    assert rotary_base(config, 72) == pytest.approx(1600)


def test_rotary_base_stays_without_scaling(internlm2_settings):
    config = InternLM2Config(**{**internlm2_settings, "max_position_embeddings": 16, "rope_scaling": None})
    assert rotary_base(config, 1000) == 100.0


@torch.no_grad()
def test_eager_and_sdpa_attention_agree_on_padded_batches(build):
    input_ids = token_ids(2, 7)
    attention_mask = torch.ones(2, 7, dtype=torch.long)
    attention_mask[0, :3] = 0
    eager, sdpa = (
        build(attn_implementation=name)(input_ids, attention_mask=attention_mask).logits for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager[0, 3:], sdpa[0, 3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(eager[1], sdpa[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_logits_equal_uncached_ones(build):
    model = build()
    input_ids = token_ids(2, 9)
    whole = model(input_ids, use_cache=False).logits
    first = model(input_ids[:, :4])
    steps = [first.logits]
    for index in range(4, 9):
        steps.append(model(input_ids[:, index : index + 1], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padded_sample_gives_the_logits_it_gives_alone(build):
    model = build()
    short, long = token_ids(1, 5, seed=1), token_ids(1, 8, seed=2)
    batch = torch.cat([torch.cat([torch.full((1, 3), 2), short], dim=1), long])
    attention_mask = torch.ones_like(batch)
    attention_mask[0, :3] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=attention_mask, position_ids=position_ids).logits
    torch.testing.assert_close(logits[:1, 3:], model(short).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], model(long).logits, atol=1e-5, rtol=1e-5)


def test_left_padded_batch_generates_the_tokens_each_sample_generates_alone(build):
    model = build()
    short, long = token_ids(1, 5, seed=1), token_ids(1, 8, seed=2)
    batch = torch.cat([torch.cat([torch.full((1, 3), 2), short], dim=1), long])
    attention_mask = torch.ones_like(batch)
    attention_mask[0, :3] = 0
    together = model.generate(batch, attention_mask=attention_mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(together[0, 8:], greedy_without_cache(model, short, 6)[0, 5:])
    assert torch.equal(together[1, 8:], greedy_without_cache(model, long, 6)[0, 8:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_tokens_of_a_loop_without_cache(build, cache):
    model = build()
    input_ids = token_ids(1, 5)
    generated = model.generate(input_ids, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    assert torch.equal(generated, greedy_without_cache(model, input_ids, 6))


@torch.no_grad()
def test_only_the_logits_asked_for_are_computed(build):
    model = build()
    input_ids = token_ids(2, 6)
    whole = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(input_ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


@torch.no_grad()
def test_logits_stay_in_the_models_dtype(build):
    assert build().bfloat16()(token_ids(1, 3)).logits.dtype == torch.bfloat16


def test_forward_returns_a_tuple_on_request(build):
    logits, cache = build()(token_ids(1, 3), return_dict=False)
    assert logits.shape == (1, 3, 40) and cache.get_seq_length() == 3


@pytest.mark.parametrize("inputs", [{}, {"input_ids": token_ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 32)}])
def test_ids_and_embeddings_exclude_each_other(build, inputs):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds: got (none|both)"):
        build()(**inputs)


@pytest.mark.parametrize(
    ("sizes", "num_parameters"),
    [
        ((2048, 8192, 24, 16), 1_889_110_016),
        ((4096, 14336, 32, 32), 7_737_708_544),
        ((6144, 16384, 48, 48), 19_861_149_696),
    ],
    ids=["1.8B", "7B", "20B"],
)
def test_full_size_model_has_the_published_number_of_parameters(sizes, num_parameters):
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    with torch.device("meta"):
        model = InternLM2ForCausalLM(InternLM2Config(**dict(zip(keys, sizes, strict=True))))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_parameters_have_the_official_names_and_shapes(build):
    names = {
        "model.tok_embeddings.weight": (40, 32),
        **{f"model.layers.{index}.{name}": shape for index in (0, 1) for name, shape in LAYER_NAMES.items()},
        "model.norm.weight": (32,),
        "output.weight": (40, 32),
    }
    assert {name: tuple(parameter.shape) for name, parameter in build().named_parameters()} == names


def test_model_has_no_buffers(build):
    assert list(build().named_buffers()) == []


def test_meta_device_is_enough_to_build_and_run(internlm2_settings):
    with torch.device("meta"):
        model = InternLM2ForCausalLM(InternLM2Config(**internlm2_settings))
        output = model(torch.zeros(2, 5, dtype=torch.long), logits_to_keep=1)
    assert output.logits.shape == (2, 1, 40) and output.logits.is_meta


def test_saved_folder_has_official_names_and_loads_to_the_same_model(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
    loaded = InternLM2ForCausalLM.from_pretrained(tmp_path)
    input_ids = token_ids(1, 4)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_tied_head_is_the_embedding_also_after_loading(build, tmp_path):
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = InternLM2ForCausalLM.from_pretrained(tmp_path)
    for tied in (model, loaded):
        assert tied.output.weight is tied.model.tok_embeddings.weight
    assert torch.equal(loaded.output.weight, model.output.weight)


def test_official_head_is_not_the_embedding(build):
    model = build()
    assert model.output.weight is not model.model.tok_embeddings.weight
