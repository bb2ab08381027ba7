"""XComposer2-4KHD and -2.5 against CLIP, Llama with merged LoRAs and a loop written here, and by name and number."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm.internlm_xcomposer2_hd.configuration import InternLMXComposer2HDConfig
from vlm.internlm_xcomposer2_hd.facts import completed, is_tiled
from vlm.internlm_xcomposer2_hd.modeling import InternLMXComposer2HDForCausalLM

IMAGE_ID = 39
VISION_PREFIX = "vit.vision_tower.vision_model."
# Tiles of 16 px in patches of 4: two positions per side once four patches are merged.
HD = {"img_size": 16, "plora_wqkv_rank": 3, "plora_wqkv_alpha": 5, "task_loras": {"sft": 2, "dpo": 3, "web": 4}}
ONE_TILE, TWO_BY_ONE = 4 + 2 + 1 + 4 + 2, 4 + 2 + 1 + 8 + 4
KHD = {"img_size": 336, "plora_wqkv_rank": 8, "plora_wqkv_alpha": 16, "task_loras": {}, "hd_upscale": True}


@pytest.fixture
def build(xcomposer2_settings, randomised):
    def model_with(**changes) -> InternLMXComposer2HDForCausalLM:
        config = InternLMXComposer2HDConfig(**{**xcomposer2_settings, **HD, **changes})
        return randomised(InternLMXComposer2HDForCausalLM(config))

    return model_with


@pytest.fixture
def model(build) -> InternLMXComposer2HDForCausalLM:
    return build()


def images(*grids, seed=0):
    """Tiles of one image per grid."""
    count = sum(1 + rows * columns for rows, columns in grids)
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "image_tiles": torch.tensor(grids)}


def prompt(*parts):
    """One sample of text ids and, by their number, image positions."""
    ids = [[IMAGE_ID] * part if isinstance(part, int) else part for part in parts]
    return torch.tensor([[token for part in ids for token in part]])


def clip_patches(model, pixel_values):
    """Features of every patch as transformers' own CLIP gives them, (tiles, 4, 4, 16)."""
    config = CLIPVisionConfig(**model.config.vision_config, image_size=16)
    clip = CLIPVisionModel(config).eval()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(VISION_PREFIX)}
    own_prefix = "vision_model." if hasattr(clip, "vision_model") else ""
    clip.load_state_dict({own_prefix + name.removeprefix(VISION_PREFIX): tensor for name, tensor in weights.items()})
    return clip(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:].view(-1, 4, 4, 16)


def reference_features(model, pixel_values, rows, columns):
    """Features of one image, position by position, from the picture of its patches."""
    patches = clip_patches(model, pixel_values)
    mosaic = torch.cat([torch.cat(list(patches[1 + r * columns :][:columns]), dim=1) for r in range(rows)])
    sequence = []
    for number, picture in enumerate((patches[0], mosaic)):
        if number:
            sequence.append(model.plora_glb_GN.flatten())
        for y in range(0, picture.shape[0], 2):
            for x in range(0, picture.shape[1], 2):
                sequence.append(torch.cat([picture[y, x], picture[y, x + 1], picture[y + 1, x], picture[y + 1, x + 1]]))
            sequence.append(model.plora_sub_GN.flatten())
    first, _, second = model.vision_proj
    hidden = F.gelu(F.linear(torch.stack(sequence), first.weight, first.bias))
    return F.linear(hidden, second.weight, second.bias)


def merged_weights(model, *, images, tasks=()):
    """The language model's weights with its low-rank products added: those for images, and those of tasks."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(("vi", "plora"))}
    merged = {}
    for name, tensor in weights.items():
        if "Plora" in name or "lora_" in name:
            continue
        stem = name.removesuffix(".weight")
        for low_rank in (*(("Plora",) if images else ()), *(f"lora_{task}" for task in tasks)):
            if f"{stem}.{low_rank}_A.weight" in weights:
                down, up = (weights[f"{stem}.{low_rank}_{side}.weight"] for side in "AB")
                scale = {"Plora": 5 / 3 if "wqkv" in name else 1.5}.get(low_rank, 1)
                tensor = tensor + scale * up @ down
        merged[name] = tensor
    return merged


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3), (3, 2)])
@torch.no_grad()
def test_features_are_the_merged_patches_of_the_whole_and_of_the_mosaic(model, grid):
    inputs = images(grid)
    sequences = model.vit(inputs["pixel_values"], [grid], model.plora_glb_GN, model.plora_sub_GN)
    expected = reference_features(model, inputs["pixel_values"], *grid)
    assert len(sequences[0]) == model.config.tiling.num_positions(*grid)
    torch.testing.assert_close(model.vision_proj(sequences[0]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["base", "write", "web"])
@torch.no_grad()
def test_image_only_prompt_equals_llama_with_merged_loras(as_llama, model, mode):
    tasks = {"base": (), "write": ("sft", "dpo"), "web": ("web",)}[mode]
    model.set_infer_mode(mode)
    inputs = images((2, 1))
    llama = as_llama(merged_weights(model, images=True, tasks=tasks), model.config)
    features = reference_features(model, inputs["pixel_values"], 2, 1)
    logits = model(prompt(TWO_BY_ONE), **inputs).logits
    torch.testing.assert_close(logits, llama(inputs_embeds=features[None]).logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("mode", ["base", "write", "web"])
@torch.no_grad()
def test_text_only_prompt_equals_llama_with_the_tasks_loras(as_llama, model, mode):
    tasks = {"base": (), "write": ("sft", "dpo"), "web": ("web",)}[mode]
    model.set_infer_mode(mode)
    llama = as_llama(merged_weights(model, images=False, tasks=tasks), model.config)
    input_ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padded_batch_of_images_of_unequal_sizes_generates_what_each_sample_does_alone(build, attention):
    model = build(attn_implementation=attention)
    first, second = prompt([5], TWO_BY_ONE, [6], ONE_TILE, [7]), prompt(ONE_TILE, [8, 9])
    tiles = images((2, 1), (1, 1), (1, 1))
    padding = first.shape[1] - second.shape[1]
    batch = torch.cat([first, F.pad(second, (padding, 0), value=2)])
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    settings = {"max_new_tokens": 4, "do_sample": False}
    for num_beams in (1, 2):
        together = model.generate(batch, attention_mask=mask, num_beams=num_beams, **tiles, **settings)
        own = [
            {"pixel_values": tiles["pixel_values"][:5], "image_tiles": tiles["image_tiles"][:2]},
            {"pixel_values": tiles["pixel_values"][5:], "image_tiles": tiles["image_tiles"][2:]},
        ]
        for sample, inputs, generated in zip((first, second), own, together, strict=True):
            alone = model.generate(sample, num_beams=num_beams, **inputs, **settings)
            assert torch.equal(generated[batch.shape[1] :], alone[0, sample.shape[1] :])


def test_generate_gives_the_tokens_of_steps_without_cache(model):
    inputs, ids = images((2, 1)), prompt([5], TWO_BY_ONE, [6])
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(ids, use_cache=False, **inputs, **settings), model.generate(ids, **inputs, **settings)
    )


@pytest.mark.parametrize(
    ("ids", "inputs", "message"),
    [
        (prompt(ONE_TILE), {"pixel_values": torch.zeros(2, 3, 16, 16)}, "image_tiles must say how many rows"),
        (prompt(ONE_TILE), images((1, 1)) | {"image_tiles": torch.tensor([[2, 1]])}, "are 2 tiles, .* make 3"),
        (prompt(ONE_TILE), images((1, 1)) | {"image_tiles": torch.tensor([[-1, -1]])}, "both at least 1"),
        (prompt(ONE_TILE), images((2, 1)), "13 image positions, but 1 images of 19 positions each"),
        (prompt(ONE_TILE), images((2, 1), (1, 1)), "13 image positions, but 2 images of 19, 13 positions"),
        (prompt(6, [5], 7), images((1, 1)), "image 0 .* but its 13 positions are not consecutive"),
    ],
    ids=["no grid", "another number of tiles", "negative grid", "too few positions", "an image too many", "torn apart"],
)
def test_tiles_that_do_not_match_their_positions_are_refused(model, ids, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(ids, **inputs)


def test_a_mode_that_is_unknown_or_whose_loras_are_missing_is_refused(build):
    with pytest.raises(ValueError, match="infer_mode is 'draw': known are base, write, web"):
        build().set_infer_mode("draw")
    with pytest.raises(ValueError, match="'web' needs LoRAs that this model lacks: web"):
        build(task_loras={"sft": 2, "dpo": 2}).set_infer_mode("web")


@pytest.mark.parametrize(
    ("changes", "num_parameters"),
    [({}, 11_095_734_272), ({"task_loras": {}, "video_mem_width": 1536}, 8_702_892_032), (KHD, 8_597_501_952)],
    ids=["2.5", "2.5-OL", "4KHD"],
)
def test_full_size_model_has_the_number_of_parameters_counted_from_its_structure(changes, num_parameters):
    with torch.device("meta"):
        model = InternLMXComposer2HDForCausalLM(InternLMXComposer2HDConfig(**changes))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert next(iter(model.named_parameters()))[0] == "plora_glb_GN"


def test_low_rank_and_root_parameters_have_the_official_names_and_shapes(build):
    model = build(video_mem_width=6)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {"plora_glb_GN": (1, 1, 64), "plora_sub_GN": (1, 1, 1, 64)}
    for layer in (0, 1):
        for linear, rank in {
            "attention.wqkv": 3,
            "attention.wo": 4,
            "feed_forward.w1": 4,
            "feed_forward.w2": 4,
        }.items():
            stem = f"model.layers.{layer}.{linear}"
            outputs, inputs = shapes[f"{stem}.weight"]
            for name, own_rank in {"Plora": rank, "lora_sft": 2, "lora_dpo": 3, "lora_web": 4}.items():
                expected |= {
                    f"{stem}.{name}_A.weight": (own_rank, inputs),
                    f"{stem}.{name}_B.weight": (outputs, own_rank),
                }
    assert {name: shapes[name] for name in expected} == expected
    assert [name for name in shapes if name.startswith("video")] == [
        f"video_mem_proj.{index}.{part}" for index in (0, 2) for part in ("weight", "bias")
    ]


@pytest.mark.parametrize("changes", [{}, {"task_loras": {}, "video_mem_width": 1536}, KHD], ids=["2.5", "OL", "4KHD"])
def test_weights_shapes_give_away_what_the_official_config_leaves_out(changes):
    config = InternLMXComposer2HDConfig(**changes)
    with torch.device("meta"):
        model = InternLMXComposer2HDForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert is_tiled(shapes)
    official = {"architectures": ["InternLMXComposer2ForCausalLM"], "vocab_size": 92544}
    found = InternLMXComposer2HDConfig.from_dict(completed(official, shapes, "here"))
    own = ("img_size", "plora_rank", "plora_alpha", "plora_wqkv_rank", "plora_wqkv_alpha", "task_loras", "hd_upscale")
    assert {key: getattr(found, key) for key in own} == {key: getattr(config, key) for key in own}
    assert found.video_mem_width == config.video_mem_width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hd_num": 0}, "hd_num is 0; it must be a whole number"),
        ({"task_loras": {"sft": 0}}, "task_loras: sft is 0"),
        ({"task_loras": {"draw": 4}}, "task_loras has draw; known are sft, dpo, web"),
        ({"hd_padding": "left"}, "hd_padding is 'left'"),
        ({"img_size": 12}, "img_size 12 is not a multiple of two patches 8"),
        ({"video_mem_width": -1}, "video_mem_width is -1"),
    ],
)
def test_contradicting_keys_are_named(xcomposer2_settings, changes, message):
    with pytest.raises(ValueError, match=message):
        InternLMXComposer2HDConfig(**{**xcomposer2_settings, **HD, **changes})


def test_saved_and_loaded_it_gives_the_same_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = InternLMXComposer2HDForCausalLM.from_pretrained(tmp_path)
    inputs, ids = images((1, 1)), prompt([5], ONE_TILE, [6])
    assert torch.equal(loaded(ids, **inputs).logits, model(ids, **inputs).logits)
