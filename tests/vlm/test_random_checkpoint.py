"""Random checkpoints: their files, their determinism, and that the model that reads them answers with words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from planner.errors import SourceError
from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config
from vlm.internlm_xcomposer2.modeling import InternLM2ForCausalLM, InternLMXComposer2ForCausalLM
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint

CLASSES = {
    "xcomposer2": (InternLMXComposer2Config, InternLMXComposer2ForCausalLM),
    "internlm2": (InternLM2Config, InternLM2ForCausalLM),
}
TINY = {"num_layers": 1, "hidden_size": 32, "intermediate_size": 32, "img_size": 28, "vision_layers": 1}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def model_of(folder: Path, family: str) -> torch.nn.Module:
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(**json.loads((folder / "config.json").read_text())))
    tensors = tensors_of(folder)
    model.to(next(iter(tensors.values())).dtype).load_state_dict(tensors, strict=True)
    return model.eval()


def answer(model: torch.nn.Module, processor: XComposer2Processor, *prompt: object) -> list[int]:
    inputs = processor(*prompt)
    ids = model.generate(
        **inputs, max_length=None, max_new_tokens=20, do_sample=False, eos_token_id=list(processor.tokenizer.stop_ids)
    )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_files_are_the_official_ones(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY, max_shard_bytes=50_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) > 2
    others = {path.name for path in folder.iterdir()} - set(shards)
    assert others == {"config.json", "generation_config.json", "tokenizer.model", "model.safetensors.index.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_index_says_where_every_tensor_is_and_how_large_they_are(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY, max_shard_bytes=50_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            found |= dict.fromkeys(weights.keys(), file.name)
            assert weights.metadata() == {"format": "pt"}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(folder).values())


def test_no_shard_is_larger_than_told_except_for_a_tensor_that_is(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY, max_shard_bytes=30_000)
    for file in folder.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 30_000 or len(sizes) == 1


def test_everything_in_one_shard_needs_no_index(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY, max_shard_bytes=2**30)
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "model.safetensors.index.json").exists()


def test_the_config_has_the_official_keys_and_fits_the_tokenizer(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = XComposer2Processor.from_folder(folder).tokenizer
    assert config["model_type"] == "internlm2"
    assert config["architectures"] == ["InternLMXComposer2ForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["vocab_size"] == tokenizer.vocab_size
    assert config["image_token_id"] == tokenizer.id_of("[UNUSED_TOKEN_0]")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, tokenizer.id_of("<|im_end|>")]


def test_the_text_family_has_no_vision_weights_or_keys(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", family="internlm2", **TINY)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["InternLM2ForCausalLM"]
    assert not {"img_size", "vision_config", "plora_rank"} & config.keys()
    assert not [name for name in tensors_of(folder) if "vit" in name or "vision" in name or "Plora" in name]


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    folders = [write_random_checkpoint(tmp_path / name, **TINY, seed=3) for name in ("a", "b")]
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


def test_another_seed_changes_every_tensor(tmp_path: Path) -> None:
    first, second = (tensors_of(write_random_checkpoint(tmp_path / str(seed), **TINY, seed=seed)) for seed in (0, 1))
    assert not [name for name in first if torch.equal(first[name], second[name])]


@pytest.mark.parametrize("changes", [{"format": "pickle"}, {"max_shard_bytes": 2**30}, {"num_layers": 2}], ids=str)
def test_layout_and_depth_change_no_values(changes: dict[str, object], tmp_path: Path) -> None:
    first = tensors_of(write_random_checkpoint(tmp_path / "a", **TINY))
    second = tensors_of(write_random_checkpoint(tmp_path / "b", **{**TINY, **changes}))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_pickles_have_their_official_names(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY, format="pickle", max_shard_bytes=2**16)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.bin"))
    assert files == [f"pytorch_model-{number:05d}-of-{len(files):05d}.bin" for number in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    assert not list(folder.glob("*.safetensors*"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_weight_has_the_dtype_asked_for(dtype: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY, dtype=dtype)
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {getattr(torch, dtype)}


def test_files_are_readable_by_whom_the_folder_is(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY)
    assert {path.stat().st_mode & 0o666 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}


@pytest.mark.parametrize("family", ["xcomposer2", "internlm2"])
def test_answers_are_varied_words_and_no_special_pieces(family: str, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", family=family, dtype="float32")
    processor, model = XComposer2Processor.from_folder(folder), model_of(folder, family)
    ids = answer(model, processor, "What is in the picture?")
    assert len(ids) == 20
    assert len(set(ids)) >= 10
    assert "\ufffd" not in processor.decode(ids)
    assert processor.decode(ids) == processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_an_image_and_its_colour_change_the_answer(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", dtype="float32")
    processor, model = XComposer2Processor.from_folder(folder), model_of(folder, "xcomposer2")
    images = [None, Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")]
    answers = {tuple(answer(model, processor, "What is in the picture?", image)) for image in images}
    assert len(answers) == 3


def test_a_vocabulary_larger_than_the_tokenizer_is_never_answered_with(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", **TINY, family="internlm2", vocab_size=5000)
    processor, tensors = XComposer2Processor.from_folder(folder), tensors_of(folder)
    assert tensors["model.tok_embeddings.weight"].shape == (5000, 32)
    answerable = tensors["output.weight"].any(dim=1).nonzero().flatten().tolist()
    assert max(answerable) < processor.tokenizer.vocab_size
    assert not {*processor.tokenizer.stop_ids, processor.image_token_id} & set(answerable)
    assert len(answerable) > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "llama"}, "family is 'llama': known are xcomposer2, internlm2"),
        ({"dtype": "int8"}, "dtype is 'int8': known are bfloat16, float16, float32"),
        ({"format": "gguf"}, "format is 'gguf': known are safetensors, pickle"),
        ({"format": "gguf", "dtype": "int8"}, "dtype is 'int8'.*; format is 'gguf'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_random_checkpoint(tmp_path / "model", **options)


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'layers'"):
        write_random_checkpoint(tmp_path / "model", layers=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"img_size": 30}, "img_size 30 is not a multiple of patch_size 14"),
        ({"vocab_size": 10}, r"vocab_size 10 is less than the \d+ pieces of the tokenizer"),
    ],
)
def test_contradicting_sizes_are_refused_and_leave_nothing(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        write_random_checkpoint(tmp_path / "model", **sizes)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SourceError, match="exists: nothing is overwritten. Choose another folder"):
        write_random_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
