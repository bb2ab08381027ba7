"""Tiling, tile pixels and prompts of XComposer2-4KHD and -2.5, against figures and pictures made in the test."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from planner.errors import SourceError
from vlm.image_pixels import CLIP_MEAN, CLIP_STD
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint
from vlm.internlm_xcomposer2_hd.configuration import InternLMXComposer2HDConfig
from vlm.internlm_xcomposer2_hd.image_processing import tile_pixels
from vlm.internlm_xcomposer2_hd.modeling import InternLMXComposer2HDForCausalLM
from vlm.internlm_xcomposer2_hd.processing import XComposer2HDProcessor
from vlm.internlm_xcomposer2_hd.tiling import Tiling

XCOMPOSER25 = Tiling(tile_px=560, positions_per_side=20, max_tiles=24, max_tiles_of_several=6)
KHD = Tiling(tile_px=336, positions_per_side=12, max_tiles=55, max_tiles_of_several=55, upscales=True, centred=True)
SMALL = Tiling(tile_px=8, positions_per_side=1, max_tiles=6, max_tiles_of_several=2)


@pytest.mark.parametrize(
    ("size", "several", "alone"),
    [
        ((560, 560), ((1, 1), 841), ((1, 1), 841)),
        ((640, 480), ((2, 2), 2061), ((2, 2), 2061)),
        ((1024, 768), ((2, 2), 2061), ((2, 2), 2061)),
        ((1280, 720), ((2, 3), 2861), ((2, 3), 2861)),
        ((1920, 1080), ((2, 3), 2861), ((3, 4), 5281)),
        ((1080, 1920), ((3, 2), 2881), ((4, 3), 5301)),
        ((3840, 2160), ((2, 3), 2861), ((4, 6), 10101)),
        ((4000, 1000), ((1, 4), 2041), ((2, 8), 6861)),
    ],
)
def test_an_image_takes_the_tiles_and_positions_worked_out_from_the_published_rule(size, several, alone):
    for num_images, (grid, positions) in ((2, several), (1, alone)):
        assert XCOMPOSER25.grid(*size, num_images=num_images) == grid
        assert XCOMPOSER25.num_positions(*grid) == positions


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid", "positions"), [((1920, 1080), 25, (4, 6), 3661), ((3840, 2160), 55, (6, 9), 8005)]
)
def test_4khd_takes_the_tiles_and_positions_of_its_examples(size, max_tiles, grid, positions):
    tiling = replace(KHD, max_tiles=max_tiles)
    assert tiling.grid(*size) == grid and tiling.num_positions(*grid) == positions


def test_only_4khd_makes_small_images_large():
    assert KHD.grid(300, 300) == (7, 7)
    assert XCOMPOSER25.grid(300, 300) == (1, 1)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_a_thread_of_an_image_still_has_a_tile(size):
    rows, columns = XCOMPOSER25.grid(*size)
    assert min(rows, columns) == 1 and rows * columns <= 24
    assert XCOMPOSER25.resized(*size, max_tiles=24)[0] >= 1


def colours(tile: torch.Tensor, y: int, x: int) -> list[int]:
    return [round(((v * s) + m).item() * 255) for v, s, m in zip(tile[:, y, x], CLIP_STD, CLIP_MEAN, strict=True)]


def test_tiles_are_cut_row_by_row_after_the_whole_and_filled_with_white_below():
    image = Image.new("RGB", (16, 12))
    for x in range(16):
        for y in range(12):
            image.putpixel((x, y), (x * 10, y * 20, 0))
    tiles, grid = tile_pixels(image, SMALL)
    assert grid == (2, 2) and tiles.shape == (5, 3, 8, 8) and tiles.dtype == torch.float32
    for number, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)], start=1):
        for y in range(8):
            for x in range(8):
                expected = [(left + x) * 10, (top + y) * 20, 0] if top + y < 12 else [255] * 3
                assert colours(tiles[number], y, x) == expected


def test_4khd_puts_white_on_both_sides():
    tiles, grid = tile_pixels(Image.new("RGB", (16, 4)), replace(SMALL, centred=True))
    assert grid == (1, 2)
    assert [colours(tiles[1], y, 0) for y in range(8)] == [[255] * 3] * 2 + [[0] * 3] * 4 + [[255] * 3] * 2


def test_a_portrait_is_a_landscape_on_its_side():
    image = Image.effect_noise((30, 11), 90).convert("RGB")
    lying, (rows, columns) = tile_pixels(image, SMALL)
    upright, grid = tile_pixels(image.transpose(Image.Transpose.TRANSPOSE), SMALL)
    assert grid == (columns, rows) != (rows, columns)
    order = [r * columns + c for c in range(columns) for r in range(rows)]
    torch.testing.assert_close(upright[1:], lying[1:].transpose(2, 3)[order])


def test_the_first_tile_shows_the_whole():
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    tiles, _ = tile_pixels(image, SMALL)
    assert colours(tiles[0], 4, 1)[0] > 200 and colours(tiles[0], 4, 6)[2] > 200


def test_several_images_have_fewer_tiles_each():
    image = Image.new("RGB", (24, 16))
    assert tile_pixels(image, SMALL, num_images=1)[1] == (2, 3)
    assert tile_pixels(image, SMALL, num_images=2)[1] == (1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose config.json says as little as the official one."""
    plain = write_random_checkpoint(tmp_path_factory.mktemp("plain") / "model", num_layers=1)
    config = InternLMXComposer2HDConfig(
        vocab_size=800,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        img_size=56,
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        task_loras={},
        image_token_id=5,
    )
    folder = tmp_path_factory.mktemp("tiled")
    shutil.copy(plain / "tokenizer.model", folder)
    weights = InternLMXComposer2HDForCausalLM(config).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["InternLMXComposer2ForCausalLM"], "vocab_size": 800}')
    return folder


def test_the_processor_reads_tile_sizes_off_the_weights(folder: Path) -> None:
    processor = XComposer2HDProcessor.from_folder(folder)
    assert processor.tiling == Tiling(tile_px=56, positions_per_side=2, max_tiles=24, max_tiles_of_several=6)


def test_images_become_runs_of_their_own_lengths(folder: Path) -> None:
    processor = XComposer2HDProcessor.from_folder(folder)
    wide, square = Image.new("RGB", (112, 56)), Image.new("RGB", (40, 40))
    inputs = processor("Compare <ImageHere> and <ImageHere>.", [wide, square])
    assert inputs["image_tiles"].tolist() == [[1, 2], [1, 1]]
    assert inputs["pixel_values"].shape == (3 + 2, 3, 56, 56)
    ids = inputs["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == (2 + 1) * 4 + 1 + 4 + (1 + 1) * 4 + 1 + 4


def test_a_lone_image_without_a_placeholder_goes_in_front_of_everything(folder: Path) -> None:
    processor = XComposer2HDProcessor.from_folder(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is this?"}]
    ids = processor(messages, Image.new("RGB", (10, 10)))["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_id
    assert ids[1:14] == [processor.image_token_id] * 13
    assert ids[14] == processor.tokenizer.id_of("<|im_start|>")


def test_a_folder_without_the_telling_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(folder / name, tmp_path)
    save_file({"plora_glb_GN": torch.zeros(1, 1, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="plora_glb_GN, .* but not vit.vision_tower"):
        XComposer2HDProcessor.from_folder(tmp_path)
