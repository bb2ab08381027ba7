"""Processor and image processing on a small written checkpoint, against arithmetic worked out in the test."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from planner.errors import SourceError
from vlm.image_pixels import CLIP_MEAN, CLIP_STD, pixel_values
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint
from vlm.internlm_xcomposer2.tokenization import InternLM2Tokenizer

IMG_SIZE, NUM_IMAGE_TOKENS = 28, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("vision") / "model", num_layers=1, img_size=IMG_SIZE)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("text") / "model", family="internlm2", num_layers=1)


@pytest.fixture(scope="module")
def processor(folder: Path) -> XComposer2Processor:
    return XComposer2Processor.from_folder(folder)


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (40, 30), colour)


def gradient(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 5 % 256, y * 7 % 256, (x + y) * 3 % 256) for y in range(height) for x in range(width)])
    return image


def text_of(processor: XComposer2Processor, ids: torch.Tensor) -> str:
    text = processor.tokenizer.decode(ids, skip_special_tokens=False)
    return text.replace("[UNUSED_TOKEN_0]" * processor.num_image_tokens, "<image>")


def test_every_pixel_is_clip_normalised_after_a_bicubic_resize_to_a_square() -> None:
    image = gradient(50, 33)
    pixels = pixel_values(image, img_size=14)
    assert pixels.shape == (1, 3, 14, 14)
    assert pixels.dtype == torch.float32
    resized = image.resize((14, 14), Image.Resampling.BICUBIC)
    for y in range(14):
        for x in range(14):
            expected = [
                (v / 255 - m) / s for v, m, s in zip(resized.getpixel((x, y)), CLIP_MEAN, CLIP_STD, strict=True)
            ]
            assert pixels[0, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (Image.new("RGBA", (3, 3), (10, 20, 30, 0)), (10, 20, 30)),
        (Image.new("L", (3, 3), 77), (77, 77, 77)),
        (Image.new("1", (3, 3), 1), (255, 255, 255)),
        (Image.new("LA", (3, 3), (50, 0)), (50, 50, 50)),
    ],
    ids=["transparent", "grey", "bilevel", "grey transparent"],
)
def test_other_modes_become_rgb_with_transparency_dropped(image: Image.Image, rgb: tuple[int, int, int]) -> None:
    expected = [(v / 255 - m) / s for v, m, s in zip(rgb, CLIP_MEAN, CLIP_STD, strict=True)]
    assert pixel_values(image, img_size=14)[0, :, 5, 5].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_palette_with_transparency_converts_without_a_warning() -> None:
    image = picture().convert("P")
    image.info["transparency"] = b"\x00\x80"
    assert torch.equal(pixel_values(image, img_size=14), pixel_values(picture(), img_size=14))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_gives_the_same_pixels_as_its_image(kind: type, tmp_path: Path) -> None:
    gradient(20, 20).save(tmp_path / "picture.png")
    from_file = pixel_values(kind(tmp_path / "picture.png"), img_size=14)
    assert torch.equal(from_file, pixel_values(gradient(20, 20), img_size=14))


def test_an_orientation_mark_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(20, 10).save(tmp_path / "turned.png", exif=exif)
    expected = pixel_values(gradient(20, 10), img_size=14)
    assert torch.equal(pixel_values(tmp_path / "turned.png", img_size=14), expected)


def test_a_missing_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"image '.*gone.png' cannot be opened: No such file.*Check the path"):
        pixel_values(tmp_path / "gone.png", img_size=14)


def test_a_folder_instead_of_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be opened: Is a directory"):
        pixel_values(tmp_path, img_size=14)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(SourceError, match=r"notes.png' is in no image format that Pillow knows. Give a PNG"):
        pixel_values(tmp_path / "notes.png", img_size=14)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_an_image_cut_off_is_refused(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"cut.{ending}"
    gradient(200, 200).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"cut\.\w+' is (damaged: .*download it again|in no image format)"):
        pixel_values(file, img_size=14)


def png(side: int, pixels: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_a_value_beyond_an_images_own_range_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bright.ppm").write_text("P3 1 1 255 0 256 0")
    with pytest.raises(SourceError, match=r"bright.ppm' is damaged: Channel value too large.* Download it again"):
        pixel_values(tmp_path / "bright.ppm", img_size=14)


@pytest.mark.parametrize("side", [10_000, 20_000], ids=["warned of by Pillow", "refused by Pillow"])
def test_a_decompression_bomb_is_refused_unread(side: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(side, b""))
    with pytest.raises(SourceError, match=r"bomb.png' is too large to decode safely: .* Scale it down"):
        pixel_values(tmp_path / "bomb.png", img_size=14)


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="the given image is 0x5 pixels: both sides must be at least 1"):
        pixel_values(Image.new("RGB", (0, 5)), img_size=14)


def test_something_else_than_an_image_is_refused() -> None:
    with pytest.raises(TypeError, match="an image is a path or a Pillow image, not Tensor"):
        pixel_values(torch.zeros(3, 4, 4), img_size=14)


def test_a_question_is_written_as_a_turn_and_has_no_pixels(processor: XComposer2Processor) -> None:
    inputs = processor("Why?")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert text_of(processor, inputs["input_ids"][0]) == (
        "<s>[UNUSED_TOKEN_146]user\nWhy?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    )
    assert inputs["attention_mask"].all()


def test_a_lone_image_without_placeholder_goes_in_front_of_the_question(processor: XComposer2Processor) -> None:
    inputs = processor("What is it?", picture())
    assert "user\n<image>What is it?[UNUSED" in text_of(processor, inputs["input_ids"][0])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == NUM_IMAGE_TOKENS
    assert torch.equal(inputs["pixel_values"], pixel_values(picture(), img_size=IMG_SIZE))


def test_an_image_goes_where_its_placeholder_is(processor: XComposer2Processor) -> None:
    inputs = processor("Is <ImageHere> redder than <ImageHere>?", [picture("red"), picture("blue")])
    assert "Is <image> redder than <image>?" in text_of(processor, inputs["input_ids"][0])
    expected = [pixel_values(picture(colour), img_size=IMG_SIZE) for colour in ("red", "blue")]
    assert torch.equal(inputs["pixel_values"], torch.cat(expected))


def test_text_after_an_image_gets_no_dummy_prefix(folder: Path) -> None:
    # Merged into the model, these bytes say normalizer_spec {add_dummy_prefix: true}.
    prefixing = InternLM2Tokenizer((folder / "tokenizer.model").read_bytes() + b"\x1a\x02\x18\x01")
    assert prefixing.encode("cat") == prefixing.encode(" cat", continued=True)
    processor = XComposer2Processor(prefixing, img_size=IMG_SIZE)
    text = text_of(processor, processor("<ImageHere>cat<ImageHere> dog", [picture(), picture()])["input_ids"][0])
    assert "<image>cat<image> dog" in text


def test_a_conversation_keeps_its_image_at_the_first_question(processor: XComposer2Processor) -> None:
    messages = [
        {"role": "user", "content": "Red?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
    ]
    text = text_of(processor, processor(messages, picture())["input_ids"][0])
    assert "user\n<image>Red?" in text
    assert text.endswith("user\nSure?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n")


def test_a_batch_is_padded_on_the_left_and_each_row_is_what_it_is_alone(processor: XComposer2Processor) -> None:
    prompts = ["Why?", "What is in the picture, and how many people are there?", "And here: <ImageHere>?"]
    images = [None, picture("red"), [picture("blue")]]
    batch = processor(prompts, images)
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = processor(prompt, image)["input_ids"][0]
        num_padding = batch["input_ids"].shape[1] - len(alone)
        assert batch["input_ids"][row].tolist() == [processor.tokenizer.pad_id] * num_padding + alone.tolist()
        assert batch["attention_mask"][row].tolist() == [0] * num_padding + [1] * len(alone)
    assert len(batch["pixel_values"]) == 2


def test_a_list_of_conversations_is_a_batch(processor: XComposer2Processor) -> None:
    batch = processor([[{"role": "user", "content": "Why?"}], "Why?"])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_a_raw_text_is_encoded_without_turns(processor: XComposer2Processor) -> None:
    assert text_of(processor, processor("A cat", chat=False)["input_ids"][0]) == "<s>A cat"
    assert text_of(processor, processor("A cat", picture(), chat=False)["input_ids"][0]) == "<s><image>A cat"
    written = "<|im_start|>user\nA <ImageHere>cat<|im_end|>\n"
    expected = "<s>[UNUSED_TOKEN_146]user\nA <image>cat[UNUSED_TOKEN_145]\n"
    assert text_of(processor, processor(written, picture(), chat=False)["input_ids"][0]) == expected


def test_messages_are_not_a_raw_text(processor: XComposer2Processor) -> None:
    with pytest.raises(ValueError, match="chat=False takes texts, not 1 messages: join them"):
        processor([{"role": "user", "content": "Hello"}], chat=False)


@pytest.mark.parametrize("prompt", ["", " \n", ["fine", ""]])
@pytest.mark.parametrize("chat", [True, False])
def test_an_empty_prompt_is_refused(prompt: str, chat: bool, processor: XComposer2Processor) -> None:
    with pytest.raises(ValueError, match="a prompt is empty: it needs some text"):
        processor(prompt, chat=chat)


def test_no_prompts_are_refused(processor: XComposer2Processor) -> None:
    with pytest.raises(ValueError, match="no prompts: give a text, a list of messages, or a list of either"):
        processor([])


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        ("<ImageHere> or <ImageHere>?", 1, r"prompt 0 has 2 <ImageHere> and 1 image\(s\): every image needs"),
        ("<ImageHere>?", 0, r"prompt 0 has 1 <ImageHere> and 0 image\(s\)"),
        ("<ImageHere>?", 2, r"prompt 0 has 1 <ImageHere> and 2 image\(s\)"),
        ("Which?", 2, r"prompt 0 has 0 <ImageHere> and 2 image\(s\)"),
    ],
)
def test_other_numbers_of_images_and_placeholders_are_refused(
    prompt: str, num_images: int, message: str, processor: XComposer2Processor
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(prompt, [picture()] * num_images)


def test_every_prompt_with_a_wrong_number_of_images_is_named(processor: XComposer2Processor) -> None:
    with pytest.raises(ValueError, match=r"prompt 0 has 1 .* and 0 image\(s\); prompt 2 has 0 .* and 2 image"):
        processor(["<ImageHere>?", "Why?", "Which?"], [None, None, [picture(), picture()]])


@pytest.mark.parametrize(("images", "given"), [([None], "a list of 1"), (picture(), "one image")])
def test_a_batch_needs_an_entry_of_images_per_prompt(
    images: object, given: str, processor: XComposer2Processor
) -> None:
    with pytest.raises(ValueError, match=f"2 prompts came with {given} for images: give a list of 2 entries"):
        processor(["a", "b"], images)


def test_the_image_piece_in_a_text_is_refused(processor: XComposer2Processor) -> None:
    message = rf"contains the image token \(id {processor.image_token_id}, \[UNUSED_TOKEN_0\]\): remove it"
    with pytest.raises(ValueError, match=message):
        processor("<ImageHere> and [UNUSED_TOKEN_0]", picture(), chat=False)


def test_a_text_only_model_takes_text_and_refuses_images(text_folder: Path) -> None:
    processor = XComposer2Processor.from_folder(text_folder)
    assert processor("Why?").keys() == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match=r"1 image\(s\) were given, but this is a text-only model: leave images out"):
        processor("Why?", picture())


def test_an_answer_ends_with_its_turn(processor: XComposer2Processor) -> None:
    encode = processor.tokenizer.encode
    assert processor.decode(encode("A cat.<|im_end|>\nmore", add_bos=False)) == "A cat."
    assert processor.decode(torch.tensor(encode("A cat.</s>more"))) == "A cat."
    assert processor.decode(encode("A cat.")) == "A cat."
    assert processor.decode([]) == ""


def changed_config(folder: Path, target: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    (target / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    return target


def test_sizes_come_from_the_config(folder: Path, tmp_path: Path) -> None:
    processor = XComposer2Processor.from_folder(changed_config(folder, tmp_path, img_size=490, image_token_id=5))
    assert (processor.img_size, processor.num_image_tokens, processor.image_token_id) == (490, 1225, 5)


def test_a_config_without_an_image_token_means_the_first_unused_piece(folder: Path, tmp_path: Path) -> None:
    config = json.loads((changed_config(folder, tmp_path) / "config.json").read_text())
    del config["image_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = XComposer2Processor.from_folder(tmp_path)
    assert processor.image_token_id == processor.tokenizer.id_of("[UNUSED_TOKEN_0]")


@pytest.mark.parametrize("value", [-1, 10**6, "3", None, True])
def test_an_image_token_outside_the_vocabulary_is_refused(value: object, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"config.json: image_token_id is {value!r}; it must be an id below vocab"):
        XComposer2Processor.from_folder(changed_config(folder, tmp_path, image_token_id=value))


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"the tokenizer has \d+ ids, but vocab_size in config.json is 100: ids"):
        XComposer2Processor.from_folder(changed_config(folder, tmp_path, vocab_size=100))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="config.json"):
        XComposer2Processor.from_folder(tmp_path)


@pytest.mark.parametrize("img_size", [15, 7, 0])
def test_an_image_size_of_broken_patches_is_refused(img_size: int, folder: Path) -> None:
    tokenizer = InternLM2Tokenizer.from_folder(folder)
    with pytest.raises(ValueError, match=f"img_size {img_size} is not a multiple of patch_size 14"):
        XComposer2Processor(tokenizer, img_size=img_size)
