"""Qwen's tokenizer and prompts, on a vocabulary and a config made in the test."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from PIL import Image

from planner.errors import SourceError
from vlm.qwen.configuration import QWenConfig
from vlm.qwen.processing import QWenProcessor
from vlm.qwen.tokenization import IMAGE_SPECIALS, TEXT_SPECIALS

VISUAL = {"image_size": 16, "patch_size": 4, "width": 16, "heads": 2, "output_dim": 32, "n_queries": 4}
CONFIG = {"hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8, "vocab_size": 480}


def test_special_tokens_have_the_published_ids():
    """Source: the config of Qwen-VL, where an image begins with 151857."""
    ids = {name: 151643 + index for index, name in enumerate(TEXT_SPECIALS + IMAGE_SPECIALS)}
    assert (ids["<|endoftext|>"], ids["<|im_end|>"], ids["<img>"], ids["<imgpad>"]) == (151643, 151645, 151857, 151859)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny vocabulary and config: 256 bytes and two tokens, then the special ones."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the"]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    start = len(tokens) + len(TEXT_SPECIALS) + IMAGE_SPECIALS.index("<img>")
    visual = {**VISUAL, "image_start_id": start}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "visual": visual}))
    return tmp_path


def test_a_question_with_images_becomes_the_models_prompt(folder):
    processor = QWenProcessor.from_folder(folder)
    picture = Image.new("RGB", (30, 20), "red")
    inputs = processor("<ImageHere><ImageHere>the?", [picture, picture])
    text = processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=False)
    image = "<img>" + 4 * "<imgpad>" + "</img>"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nPicture 1: {image}\nPicture 2: {image}\nthe?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert processor.decode([257, processor.tokenizer.id_of("<|im_end|>"), 257]) == "the"


def test_a_text_model_has_no_tokens_of_images(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "visual": None}))
    processor = QWenProcessor.from_folder(folder)
    assert processor.tokenizer.id_of("<img>") is None
    assert len(processor("<img>", chat=False)["input_ids"][0]) == 5
    with pytest.raises(ValueError, match="text-only model"):
        processor("the", Image.new("RGB", (4, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": {**VISUAL, "image_start_id": 5}}, "image_start_id is 5, but <img> is 472 in the tokenizer"),
        ({"visual": None, "vocab_size": 460}, "the tokenizer has 466 ids, but vocab_size in config.json is 460"),
        ({"seq_length": 0}, "config.json: QWenConfig: seq_length is 0"),
    ],
)
def test_a_config_that_does_not_fit_the_tokenizer_or_itself_is_refused(folder, changes, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SourceError, match=message):
        QWenProcessor.from_folder(folder)


def test_a_saved_text_model_names_nothing_of_images():
    assert not {"visual", "image_token_id"} & QWenConfig(**CONFIG).to_dict().keys()
    assert (
        QWenConfig.from_dict(QWenConfig(**CONFIG, visual={**VISUAL, "image_start_id": 5}).to_dict()).image_token_id == 7
    )
