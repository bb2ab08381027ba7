"""MODEL: names, folders, facts, and that the torch-free facts are those of the real modules."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from planner.errors import ConstraintError, SourceError, UnsupportedModelError
from planner.workload import Workload
from vlm.catalogue import catalogue_names, lookup
from vlm.cost_library import read_shipped, variant
from vlm.internlm_xcomposer2.planned import ARCHITECTURES
from vlm.model import Model, find_model
from vlm.skeleton import build_skeleton
from vlm.traced import TracedModel

PARAMETERS = {
    "internlm-xcomposer2-vl-7b": 8_666_840_064,
    "internlm-xcomposer2-7b": 8_665_847_808,
    "internlm2-1_8b": 1_889_110_016,
    "internlm2-7b": 7_737_708_544,
    "internlm2-20b": 19_861_149_696,
    "internlm2-chat-1_8b": 1_889_110_016,
    "internlm2-chat-7b": 7_737_708_544,
    "internlm2-chat-20b": 19_861_149_696,
}


def edit_config(folder: Path, **changes: object) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def folder(tiny_xcomposer2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_xcomposer2, tmp_path / "copy"))


WRITTEN = sorted(name for name in catalogue_names() if lookup(name).config["architectures"][0] in ARCHITECTURES)
TRACED = sorted(set(catalogue_names()) - set(WRITTEN))


@pytest.mark.parametrize("name", WRITTEN)
def test_catalogue_totals_are_the_published_ones(name: str) -> None:
    model = find_model(name)
    total = sum(prod(shape) for shape in model.facts.tensor_shapes().values())
    assert total == lookup(name).parameters == PARAMETERS[name]
    assert model.graph(model.resolved(Workload())).num_parameters == total


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize(("images", "batch_size"), [(0, 1), (0, 2), (1, 1), (1, 2)])
def test_traced_costs_ship_for_every_catalogue_model(name: str, images: int, batch_size: int) -> None:
    model = find_model(name)
    asked = Workload(num_images=images * model.has_images, batch_size=batch_size)
    if batch_size > 1 and not on_file(model, replace(asked, dtype="bfloat16")):
        # Some are traced when asked for; an encoder that runs once per image is no polynomial in the batch at all.
        with pytest.raises(UnsupportedModelError, match="has no costs on file for batch 2"):
            model.graph(model.resolved(asked))
        return
    resolved = model.resolved(asked)
    graph = model.graph(resolved)
    assert (graph.num_parameters, resolved.num_images) == (lookup(name).parameters, asked.num_images)
    assert graph.extrapolated(model.quantities(resolved)) == ()


def on_file(model: Model, workload: Workload) -> bool:
    assert isinstance(model, TracedModel)
    return variant(workload) in read_shipped(model.catalogue_stem or "")


@pytest.mark.parametrize("name", sorted({lookup(name).name for name in WRITTEN}))
def test_facts_name_every_weight_of_the_real_modules_in_its_shape(name: str) -> None:
    model = find_model(name)
    skeleton = build_skeleton(model, dtype=torch.float16)
    real = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    assert model.facts.tensor_shapes() == real


@pytest.mark.parametrize("spelling", ["internlm/InternLM2-Chat-20B", "INTERNLM2-CHAT-20B", "internlm2-chat-20b"])
def test_a_hub_name_is_found_in_any_spelling(spelling: str) -> None:
    model = find_model(spelling)
    assert (model.name, model.origin, model.facts.num_hidden_layers) == ("internlm2-chat-20b", "catalogue", 48)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("internlm-xcomposer2-v1-7b", "Did you mean internlm-xcomposer2-vl-7b"),
        ("someone/internlm2-7b", "neither a folder here nor a model in the catalogue"),
        ("zzz", "See `plan-devices models` for all names"),
    ],
    ids=["near miss", "other organisation", "nothing near"],
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        find_model(name)


def test_a_path_that_does_not_exist_is_not_looked_up_in_the_catalogue() -> None:
    with pytest.raises(SourceError, match=r"there is no folder \./internlm2-7b"):
        find_model("./internlm2-7b")


def test_an_existing_folder_wins_over_the_catalogue(tiny_internlm2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_internlm2, tmp_path / "internlm2-7b")
    with contextlib.chdir(tmp_path):
        model = find_model("internlm2-7b")
    assert (model.origin, model.facts.num_hidden_layers) == ("folder", 6)


def test_dispatch_follows_the_weights_when_the_config_names_no_architecture(folder: Path, tiny_internlm2: Path) -> None:
    edit_config(folder, architectures=None)
    assert find_model(str(folder)).facts.architecture == "InternLMXComposer2ForCausalLM"
    assert find_model(str(tiny_internlm2)).facts.architecture == "InternLM2ForCausalLM"


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    edit_config(folder, architectures=["NoSuchModel"], model_type="no_such_type")
    with pytest.raises(
        UnsupportedModelError, match="model_type 'no_such_type' and architecture 'NoSuchModel': neither"
    ):
        build_skeleton(find_model(str(folder)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing; it must be a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"img_size": 60}, "img_size 60 is not a multiple of patch_size 14"),
        ({"bias": True}, "bias is true"),
        ({"vision_config": 7}, "vision_config is 7, not a mapping"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_contradictory_config_names_key_and_value(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(SourceError, match=message):
        find_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 7}, r"17 weights missing: model\.layers\.6\."),
        ({"num_hidden_layers": 5}, r"17 unknown: model\.layers\.5\."),
        ({"intermediate_size": 100}, r"of another shape: model\.layers\.0\.feed_forward\.w1\.weight is \[96, 32\]"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_weights_that_are_not_those_of_the_config_are_listed(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(SourceError, match=message):
        find_model(str(folder))


def test_dtype_auto_is_the_checkpoints_when_16_bit_and_the_familys_otherwise(
    tiny_xcomposer2: Path, tiny_internlm2: Path
) -> None:
    assert find_model(str(tiny_internlm2)).resolved(Workload()).dtype == "bfloat16"
    assert find_model(str(tiny_xcomposer2)).resolved(Workload()).dtype == "float16"
    assert find_model("internlm2-7b").resolved(Workload(dtype="bfloat16")).kv_dtype == "bfloat16"


def test_the_cache_holds_prompt_image_and_new_tokens_unless_told_otherwise() -> None:
    model = find_model("internlm-xcomposer2-vl-7b")
    assert model.resolved(Workload()).max_model_len == 512 + 1225 + 512
    assert model.resolved(Workload(num_images=0)).max_model_len == 1024
    assert model.resolved(Workload(max_model_len=8192)).max_model_len == 8192
    with pytest.raises(ConstraintError, match=r"512 prompt \+ 1225 image \+ 512 new = 2249 positions"):
        model.resolved(Workload(max_model_len=2248))


def test_a_language_model_is_planned_without_images() -> None:
    model = find_model("internlm2-7b")
    assert model.quantities(model.resolved(Workload(num_images=3))).image_tokens == 0


def test_the_fingerprint_is_one_for_a_size_and_another_for_any_other(tiny_xcomposer2: Path, folder: Path) -> None:
    assert find_model(str(tiny_xcomposer2)).fingerprint == find_model(str(folder)).fingerprint
    names = ["internlm2-7b", "internlm2-20b", "internlm-xcomposer2-7b", "internlm-xcomposer2-vl-7b"]
    assert len({find_model(name).fingerprint for name in names}) == len(names)
