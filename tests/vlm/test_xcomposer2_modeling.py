"""InternLM-XComposer2 against Llama, CLIP and a slow loop written here, and against itself in other ways of running."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm import image_positions
from vlm.internlm_xcomposer2.configuration import InternLMXComposer2Config
from vlm.internlm_xcomposer2.modeling import InternLMXComposer2ForCausalLM
from vlm.internlm_xcomposer2.plora import PLoRALinear

IMAGE_ID = 39
IMAGE = [IMAGE_ID] * 4
VISION_PREFIX = "vit.vision_tower.vision_model."


@pytest.fixture
def build(xcomposer2_settings, randomised):
    def model_with(**changes) -> InternLMXComposer2ForCausalLM:
        return randomised(InternLMXComposer2ForCausalLM(InternLMXComposer2Config(**{**xcomposer2_settings, **changes})))

    return model_with


@pytest.fixture
def model(xcomposer2) -> InternLMXComposer2ForCausalLM:
    return xcomposer2


def token_ids(*shape, seed=0):
    """Random text ids: neither padding nor the image's."""
    return torch.randint(3, IMAGE_ID, shape, generator=torch.Generator().manual_seed(seed))


def images(count, *, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prompt(*parts):
    """One sample of text ids and images."""
    return torch.tensor([[token for part in parts for token in part]])


def left_padded(*samples):
    """Samples of one batch and its attention mask."""
    length = max(sample.shape[1] for sample in samples)
    batch = torch.cat([F.pad(sample, (length - sample.shape[1], 0), value=2) for sample in samples])
    mask = torch.cat([F.pad(torch.ones_like(sample), (length - sample.shape[1], 0)) for sample in samples])
    return batch, mask


@torch.no_grad()
def reference_features(model, pixel_values):
    """What the projector makes of CLIP's last hidden states, by transformers' own model."""
    config = CLIPVisionConfig(**model.config.vision_config, image_size=8, attn_implementation="eager")
    clip = CLIPVisionModel(config).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(VISION_PREFIX)}
    own_prefix = "vision_model." if hasattr(clip, "vision_model") else ""
    clip.load_state_dict({own_prefix + name.removeprefix(VISION_PREFIX): tensor for name, tensor in weights.items()})
    patches = clip(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
    first, _, second = model.vision_proj
    hidden = F.linear(patches, first.weight, first.bias)
    return F.linear(0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)), second.weight, second.bias)


def merged_weights(model, *, scale):
    """The language model's weights with `scale` times its low-rank products added."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vi")}
    merged = {}
    for name, tensor in weights.items():
        if "Plora" in name:
            continue
        low_rank = [weights.get(name.replace(".weight", f".Plora_{side}.weight")) for side in "BA"]
        merged[name] = tensor if low_rank[0] is None else tensor + scale * low_rank[0] @ low_rank[1]
    return merged


def slow_logits(model, embeddings, is_image):
    """Logits of one sample by plain loops over layers, positions and heads, from the weights alone."""
    config = model.config
    plain, merged = merged_weights(model, scale=0.0), merged_weights(model, scale=1.5)

    def linear(name, rows):
        return torch.stack(
            [(merged if image else plain)[name] @ row for row, image in zip(rows, is_image, strict=True)]
        )

    def norm(name, rows):
        return torch.stack([row / (row.pow(2).mean() + config.rms_norm_eps).sqrt() for row in rows]) * plain[name]

    def turned(head, position):
        angles = position * 100.0 ** (-torch.arange(4) / 4)
        turned = torch.complex(head[:4], head[4:]) * torch.polar(torch.ones(4), angles)
        return torch.cat([turned.real, turned.imag])

    hidden = embeddings
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        packed = linear(at + "attention.wqkv.weight", norm(at + "attention_norm.weight", hidden)).view(-1, 2, 4, 8)
        mixed = torch.zeros(len(hidden), 4, 8)
        for now in range(len(hidden)):
            for head in range(4):
                group, slot = divmod(head, 2)
                query = turned(packed[now, group, slot], now)
                keys = torch.stack([turned(packed[then, group, 2], then) for then in range(now + 1)])
                mixed[now, head] = (keys @ query / 8**0.5).softmax(0) @ packed[: now + 1, group, 3]
        hidden = hidden + linear(at + "attention.wo.weight", mixed.flatten(1))
        rows = norm(at + "ffn_norm.weight", hidden)
        gate, up = (linear(f"{at}feed_forward.{name}.weight", rows) for name in ("w1", "w3"))
        hidden = hidden + linear(at + "feed_forward.w2.weight", gate * gate.sigmoid() * up)
    return norm("model.norm.weight", hidden) @ plain["output.weight"].T


@torch.no_grad()
def greedy_without_cache(model, input_ids, num_steps, pixel_values):
    for _ in range(num_steps):
        logits = model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


@torch.no_grad()
def test_vision_features_are_clips_last_hidden_states_without_class_token(model):
    pixel_values = images(2)
    features = model.vision_proj(model.vit(pixel_values))
    torch.testing.assert_close(features, reference_features(model, pixel_values), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_low_rank_part_reaches_image_rows_only(randomised):
    layer = randomised(PLoRALinear(6, 5, bias=True, rank=2, alpha=3))
    rows = torch.randn(2, 3, 6)
    is_image = torch.tensor([[False, True, True], [True, False, False]])
    base = rows @ layer.weight.T + layer.bias
    full = rows @ (layer.weight + 1.5 * layer.Plora_B.weight @ layer.Plora_A.weight).T + layer.bias
    output = layer(rows, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(output, torch.where(is_image[..., None], full, base), atol=1e-6, rtol=1e-6)
    assert torch.equal(output[~is_image], base[~is_image])


@torch.no_grad()
def test_low_rank_part_is_absent_without_image_rows(randomised):
    layer = randomised(PLoRALinear(6, 5, bias=False, rank=2, alpha=3))
    rows = torch.randn(2, 3, 6)
    assert torch.equal(layer(rows), F.linear(rows, layer.weight))


@torch.no_grad()
def test_image_only_prompt_equals_llama_with_merged_lora(as_llama, model):
    pixel_values = images(4)
    llama = as_llama(merged_weights(model, scale=1.5), model.config)
    expected = llama(inputs_embeds=reference_features(model, pixel_values).view(2, 8, 32)).logits
    logits = model(prompt(IMAGE, IMAGE).repeat(2, 1), pixel_values=pixel_values).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_text_only_prompt_equals_llama_without_lora(as_llama, model):
    llama = as_llama(merged_weights(model, scale=0.0), model.config)
    input_ids = token_ids(2, 9)
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_mixed_batch_equals_a_slow_loop_per_sample(build, attention):
    model = build(attn_implementation=attention)
    pixel_values = images(4)
    batch = torch.cat([prompt([5, 6], IMAGE, [7], IMAGE, [8]), prompt(IMAGE, [9, 10, 11], IMAGE, [12])])
    features = reference_features(model, pixel_values).flatten(0, 1)
    logits = model(batch, pixel_values=pixel_values).logits
    for sample, sample_features in enumerate((features[:8], features[8:])):
        is_image = batch[sample] == IMAGE_ID
        embeddings = model.model.tok_embeddings.weight[batch[sample]].clone()
        embeddings[is_image] = sample_features
        torch.testing.assert_close(logits[sample], slow_logits(model, embeddings, is_image), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cached_logits_equal_uncached_ones(model):
    input_ids, pixel_values = prompt([5], IMAGE, [6, 7, 8, 9]), images(1)
    whole = model(input_ids, pixel_values=pixel_values, use_cache=False).logits
    first = model(input_ids[:, :6], pixel_values=pixel_values)
    second = model(input_ids[:, 6:8], past_key_values=first.past_key_values)
    third = model(input_ids[:, 8:], past_key_values=first.past_key_values)
    steps = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=1e-5)


def test_generate_with_an_image_gives_the_tokens_of_a_loop_without_cache(model):
    input_ids, pixel_values = prompt([5], IMAGE, [6, 7]), images(1)
    generated = model.generate(input_ids, pixel_values=pixel_values, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, greedy_without_cache(model, input_ids, 6, pixel_values))


def test_generate_without_cache_sees_the_image_at_every_step(model):
    inputs = {"input_ids": prompt([5], IMAGE, [6, 7]), "pixel_values": images(1)}
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs, use_cache=False, **settings), model.generate(**inputs, **settings))


def test_image_changes_the_generated_tokens(model):
    """Or the comparisons of generated tokens would prove nothing about images."""
    input_ids = prompt([5], IMAGE, [6, 7])
    seen = {tuple(model.generate(input_ids, pixel_values=images(1, seed=s), max_new_tokens=6)[0]) for s in range(4)}
    assert len(seen) > 1


@pytest.mark.parametrize("num_beams", [1, 3])
def test_left_padded_batch_generates_the_tokens_each_sample_generates_alone(model, num_beams):
    """One sample has two images, the other one: their images are dealt out to the beams of their own sample."""
    samples = prompt([5], IMAGE, [6], IMAGE, [7]), prompt(IMAGE, [8, 9])
    batch, attention_mask = left_padded(*samples)
    pixel_values = images(3)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    together = model.generate(batch, attention_mask=attention_mask, pixel_values=pixel_values, **settings)
    for sample, generated, own in zip(samples, together, (pixel_values[:2], pixel_values[2:]), strict=True):
        alone = model.generate(sample, pixel_values=own, **settings)
        assert torch.equal(generated[batch.shape[1] :], alone[0, sample.shape[1] :])


def test_every_beam_gets_its_own_samples_images_in_order(model):
    batch, _ = left_padded(prompt([5], IMAGE, [6], IMAGE, [7]), prompt([8, 9]), prompt(IMAGE, [8, 9]))
    pixel_values = images(3)
    expanded_ids, inputs = model._expand_inputs_for_generation(2, input_ids=batch, pixel_values=pixel_values)
    assert torch.equal(expanded_ids, batch[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(inputs["pixel_values"], pixel_values[[0, 1, 0, 1, 2, 2]])


@torch.no_grad()
def joined_elsewhere(model, input_ids, pixel_values):
    im_mask = input_ids == IMAGE_ID
    embeddings = model.model.tok_embeddings(input_ids)
    embeddings[im_mask] = reference_features(model, pixel_values).flatten(0, 1)
    return {"inputs_embeds": embeddings, "im_mask": im_mask}


@torch.no_grad()
def test_embeddings_with_a_mask_give_the_logits_of_pixels(model):
    input_ids, pixel_values = prompt([5], IMAGE, [6, 7]), images(1)
    by_mask = model(**joined_elsewhere(model, input_ids, pixel_values)).logits
    torch.testing.assert_close(by_mask, model(input_ids, pixel_values=pixel_values).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_embeddings_with_a_mask_generate_the_tokens_of_pixels(model, num_beams):
    input_ids, pixel_values = prompt([5], IMAGE, [6, 7]), images(1)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    by_mask = model.generate(**joined_elsewhere(model, input_ids, pixel_values), **settings)
    by_pixels = model.generate(input_ids, pixel_values=pixel_values, **settings)
    assert torch.equal(by_mask, by_pixels[:, input_ids.shape[1] :])


@torch.no_grad()
def test_mask_without_an_image_position_is_text(model):
    embeddings = model.model.tok_embeddings(token_ids(1, 4))
    without = model(inputs_embeds=embeddings).logits
    assert torch.equal(model(inputs_embeds=embeddings, im_mask=torch.zeros(1, 4, dtype=torch.bool)).logits, without)


@torch.no_grad()
def test_image_id_is_text_where_no_pixels_come(as_llama, model):
    llama = as_llama(merged_weights(model, scale=0.0), model.config)
    input_ids = prompt([5, IMAGE_ID, 6])
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("input_ids", "num_images", "message"),
    [
        (prompt([5], IMAGE), 2, "4 image positions, but 2 images of 4 positions each"),
        (prompt([5, 6]), 1, "0 image positions, but 1 images of 4"),
        (prompt([5], IMAGE[:3], [6], IMAGE[:1]), 1, r"image 0 .* position 1 of sample 0, but its 4 positions are not"),
        (torch.tensor([[5, 6, IMAGE_ID, IMAGE_ID], [IMAGE_ID] * 2 + [7, 8]]), 1, "not consecutive in that sample"),
    ],
    ids=["an image too many", "no position", "torn apart", "across samples"],
)
def test_images_that_do_not_match_their_positions_are_refused(model, input_ids, num_images, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids, pixel_values=images(num_images))
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids, pixel_values=images(num_images), num_beams=2, max_new_tokens=1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 4, 32), "pixel_values": images(1)}, "pixel_values go with input_ids alone"),
        ({"input_ids": prompt([5]), "im_mask": torch.ones(1, 1)}, r"im_mask \(1, 1\) .* are None"),
        ({"inputs_embeds": torch.zeros(1, 4, 32), "im_mask": torch.ones(1, 3)}, r"im_mask \(1, 3\) .* are \(1, 4\)"),
    ],
    ids=["pixels and embeddings", "mask without embeddings", "mask of another length"],
)
def test_image_inputs_that_do_not_go_together_are_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@torch.no_grad()
def test_pixels_are_cast_to_the_encoders_dtype(build):
    model = build().bfloat16()
    assert model(prompt(IMAGE, [5]), pixel_values=images(1)).logits.dtype == torch.bfloat16


def test_features_on_another_device_than_the_embeddings_are_an_error(build):
    model = build()
    model.vit.to("meta")
    model.vision_proj.to("meta")
    with pytest.raises(RuntimeError, match="device"):
        model(prompt([5], IMAGE), pixel_values=images(1).to("meta"))


def test_nothing_in_the_join_moves_a_tensor():
    names = {
        node.attr for node in ast.walk(ast.parse(inspect.getsource(image_positions))) if isinstance(node, ast.Attribute)
    }
    assert "cat" in names
    assert not names & {"to", "device", "cpu", "cuda", "to_empty", "type_as", "new_tensor", "copy_"}
