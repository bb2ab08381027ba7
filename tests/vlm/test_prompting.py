"""Questions with pictures -> inputs, by a checkpoint's own processor, with and without its video part, or by ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import logging

from planner import ConstraintError, SourceError
from tests.tiny_checkpoints import write_llava, write_qwen2_vl
from vlm.prompting import Prompter, Question, prompter_for

PICTURE = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
WIDE = Image.linear_gradient("L").resize((112, 28)).convert("RGB")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.disable_progress_bar()
    return write_llava(tmp_path_factory.mktemp("prompting") / "llava")


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.disable_progress_bar()
    return write_qwen2_vl(tmp_path_factory.mktemp("prompting") / "qwen2_vl")


def words(prompter: Prompter, question: Question) -> str:
    """The prompt as the model gets it, special tokens and all."""
    ids = prompter.inputs([question])["input_ids"][0].tolist()
    return prompter._tokenizer.decode(ids)  # type: ignore[attr-defined]


def test_a_checkpoints_template_and_processor_are_used(llava: Path) -> None:
    prompter = prompter_for(llava, "LlavaForConditionalGeneration")
    inputs = prompter.inputs([Question(prompt="what is in the garden", images=(PICTURE,))])
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)
    assert words(prompter, Question(prompt="a cat", images=(PICTURE,))) == "<image> " * 64 + "a cat ?"
    assert words(prompter, Question(prompt="a cat")) == "a cat ?"


def test_pictures_go_where_their_placeholders_are(llava: Path) -> None:
    prompter = prompter_for(llava, "LlavaForConditionalGeneration")
    question = Question(prompt="a <ImageHere> and <ImageHere> tree", images=(PICTURE, WIDE))
    assert words(prompter, question) == f"a {'<image> ' * 64}and {'<image> ' * 64}tree ?"
    assert prompter.inputs([question])["pixel_values"].shape[0] == 2


def test_a_batch_is_padded_on_the_left(llava: Path) -> None:
    prompter = prompter_for(llava, "LlavaForConditionalGeneration")
    batch = prompter.inputs([Question(prompt="a cat sits on the tree"), Question(prompt="a cat")])
    assert batch["attention_mask"].tolist() == [[1] * 7, [0] * 4 + [1] * 3]


def test_without_torchvision_a_processor_is_made_without_its_video_part(qwen2_vl: Path) -> None:
    with pytest.raises(ImportError, match="Torchvision"):
        AutoProcessor.from_pretrained(qwen2_vl)
    prompter = prompter_for(qwen2_vl, "Qwen2VLForConditionalGeneration")
    inputs = prompter.inputs([Question(prompt="what is in the garden", images=(WIDE,))])
    # 112 x 28 pixels are 8 x 2 patches, and four of them one position.
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 8]]
    assert words(prompter, Question(prompt="a cat", images=(WIDE,))).count("<|image_pad|>") == 4


def test_our_own_processors_are_asked_alike(tiny_xcomposer2: Path) -> None:
    prompter = prompter_for(tiny_xcomposer2, "InternLMXComposer2ForCausalLM")
    one = prompter.inputs([Question(prompt="What is in the garden?", images=(PICTURE,))])
    two = prompter.inputs([Question(prompt="What is it?", images=(PICTURE, WIDE))])
    assert one["pixel_values"].shape[0] == 1
    assert two["pixel_values"].shape[0] == 2
    assert prompter.stop_ids


@pytest.mark.parametrize(
    ("prompt", "num_images", "message"),
    [
        (" ", 0, "the prompt is empty"),
        ("<ImageHere>", 1, "the prompt is empty"),
        ("<ImageHere> a cat", 2, "has 1 <ImageHere> and came with 2 pictures"),
        ("a <ImageHere> <ImageHere> cat", 1, "has 2 <ImageHere> and came with 1 pictures"),
    ],
)
def test_a_question_that_contradicts_itself_is_refused(prompt: str, num_images: int, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        Question(prompt=prompt, images=(PICTURE,) * num_images)


def test_a_picture_for_a_language_model_is_refused(tiny_internlm2: Path) -> None:
    prompter = prompter_for(tiny_internlm2, "InternLM2ForCausalLM")
    with pytest.raises(ConstraintError, match="text-only model"):
        prompter.inputs([Question(prompt="What is it?", images=(PICTURE,))])


def test_a_wrong_picture_is_named(llava: Path, tmp_path: Path) -> None:
    prompter = prompter_for(llava, "LlavaForConditionalGeneration")
    (tmp_path / "words.jpg").write_text("not a picture")
    for name, message in (("words.jpg", "in no image format that Pillow knows"), ("none.jpg", "none.jpg")):
        with pytest.raises(SourceError, match=message):
            prompter.inputs([Question(prompt="a cat", images=(tmp_path / name,))])


def test_a_folder_without_a_tokenizer_is_refused(llava: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llava, tmp_path / "copy"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(SourceError, match="no processor or tokenizer can be made of"):
        prompter_for(folder, "LlavaForConditionalGeneration")


def test_answers_are_decoded_without_special_tokens(llava: Path) -> None:
    prompter = prompter_for(llava, "LlavaForConditionalGeneration")
    ids = prompter.inputs([Question(prompt="a cat sits")])["input_ids"][0]
    assert prompter.decode([*ids.tolist(), 2, 0]) == "a cat sits ?"
    assert torch.is_tensor(ids)
