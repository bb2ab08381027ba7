"""The processor of a folder is found by its architecture, and by its weights where two families share one."""

from __future__ import annotations

import base64
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from planner.errors import UnsupportedModelError
from vlm.families import FAMILIES
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint
from vlm.internlm_xcomposer2_hd.processing import XComposer2HDProcessor
from vlm.processors import load_processor
from vlm.qwen.processing import QWenProcessor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", num_layers=1, max_shard_bytes=2**30)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_familys_classes_are_where_it_says(family) -> None:
    for module, name in (
        ("configuration", family.config_class),
        ("modeling", family.model_class),
        ("processing", family.processor_class),
    ):
        assert hasattr(import_module(f"{family.package}.{module}"), name)


def test_xcomposer2_is_known_by_its_architecture_or_without_one(folder: Path) -> None:
    assert type(load_processor(folder)) is XComposer2Processor
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "architectures"}))
    assert type(load_processor(folder)) is XComposer2Processor


def test_tiles_are_known_by_the_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "plora_glb_GN": torch.zeros(1, 1, 128)}, folder / "model.safetensors")
    assert type(load_processor(folder)) is XComposer2HDProcessor


def test_a_folder_without_weights_is_enough_where_the_architecture_tells(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["QWenLMHeadModel"]}))
    lines = (base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    assert type(load_processor(tmp_path)) is QWenProcessor


def test_another_architecture_is_transformers_own_business(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlavaForConditionalGeneration"]}))
    with pytest.raises(UnsupportedModelError, match="names 'LlavaForConditionalGeneration', .* AutoProcessor"):
        load_processor(tmp_path)
