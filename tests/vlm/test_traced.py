"""Models known by their traces: what an image counts for, which costs are asked for, and where they are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner import Workload
from planner.errors import ConstraintError, PlannerError, SourceError, UnsupportedModelError
from planner.graph import Home, Linear, ModuleGraph, ModuleGroup
from vlm.checkpoint import Checkpoint, TensorHeader
from vlm.cost_library import CostLibrary
from vlm.held import held_graph
from vlm.image_rule import ImageRule
from vlm.internlm_xcomposer2_hd.tiling import Tiling
from vlm.model import find_model
from vlm.traced import TracedCosts, TracedModel, costs_key

FIXED = ImageRule(native_px=(336, 336), any_size=False, cell_px=None, patches=576, tokens=576)
BY_CELL = ImageRule(native_px=(448, 448), any_size=True, cell_px=28, patches=4, tokens=1)
BY_TRACE = ImageRule(native_px=(1000, 700), any_size=True, cell_px=None, patches=3600, tokens=950)
TILING = Tiling(tile_px=560, positions_per_side=20, max_tiles=24, max_tiles_of_several=6)
BY_TILE = ImageRule(native_px=(448, 448), any_size=True, cell_px=None, patches=1600, tokens=400, tiling=TILING)


def costs(image: ImageRule | None) -> TracedCosts:
    group = ModuleGroup(id="a", modules=("a",), role="decoder_layer", weight_bytes=8, num_parameters=4)
    graph = ModuleGraph(name="toy", dtype="bfloat16", groups=(group,), home=Home())
    return TracedCosts(graph=graph, image=image, fingerprint="f00d", max_positions=4096, versions="torch 0")


class Tracer:
    """Answers every question with the same costs, and counts the questions."""

    def __init__(self, image: ImageRule | None = FIXED) -> None:
        self.costs = costs(image)
        self.asked: list[str] = []

    def __call__(self, model: TracedModel, workload: Workload) -> TracedCosts:
        self.asked.append(costs_key(workload))
        return self.costs


def model(find_costs: Any, config: Mapping[str, Any] | None = None) -> TracedModel:
    return TracedModel(
        name="toy",
        origin="folder",
        architecture="ToyForConditionalGeneration",
        default_dtype="bfloat16",
        config=config or {"model_type": "toy", "vision_config": {}},
        find_costs=find_costs,
    )


@pytest.mark.parametrize(
    ("rule", "size", "counts"),
    [
        pytest.param(FIXED, None, (576, 576), id="fixed"),
        pytest.param(FIXED, (4000, 3000), (576, 576), id="fixed, another size asked for"),
        pytest.param(BY_CELL, None, (1024, 256), id="native"),
        pytest.param(BY_CELL, (896, 672), (3072, 768), id="by cell"),
        pytest.param(BY_CELL, (901, 660), (3072, 768), id="rounded to cells"),
        pytest.param(BY_CELL, (1, 1), (4, 1), id="never less than a cell"),
        pytest.param(BY_TRACE, (1000, 700), (3600, 950), id="the traced size"),
        pytest.param(BY_TRACE, (999, 700), None, id="another size needs a trace"),
        pytest.param(BY_TILE, None, (3200, 841), id="the whole view and one tile"),
        pytest.param(BY_TILE, (2240, 3360), (40000, 10141), id="24 tiles"),
    ],
)
def test_what_an_image_amounts_to(
    rule: ImageRule, size: tuple[int, int] | None, counts: tuple[int, int] | None
) -> None:
    assert rule.counts(size) == counts


def test_several_pictures_have_fewer_tiles_each() -> None:
    assert BY_TILE.counts((2240, 3360), num_images=2) == (7 * 1600, 7 * 400 + 1 + 4 * 20)


def test_smaller_pictures_amount_to_less_each() -> None:
    assert list(FIXED.smaller(None)) == list(BY_TRACE.smaller(None)) == []
    assert next(BY_CELL.smaller((896, 672))) == (784, 588)
    amounts = [BY_TILE.counts(size) for size in BY_TILE.smaller((2240, 3360))]
    assert len(set(amounts)) == len(amounts) > 1 and amounts == sorted(amounts, reverse=True)


def test_a_workload_is_resolved_with_the_images_positions() -> None:
    toy = model(Tracer())
    resolved = toy.resolved(Workload(num_images=2, prompt_tokens=100, new_tokens=50))
    assert (resolved.dtype, resolved.kv_dtype, resolved.max_model_len) == ("bfloat16", "bfloat16", 2 * 576 + 150)
    quantities = toy.quantities(resolved)
    assert (quantities.patches, quantities.image_tokens, quantities.positions) == (1152, 1152, 1302)


def test_a_model_without_images_gets_none() -> None:
    text = model(Tracer(None), {"model_type": "llama", "hidden_size": 8})
    assert not text.has_images
    assert text.resolved(Workload(num_images=3)).num_images == 0


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (
            Workload(max_model_len=600),
            r"512 prompt \+ 576 image \+ 512 new = 1600 positions. Raise --max-model-len to 1600",
        ),
        (Workload(kv_dtype="float32"), "kv_dtype float32 with dtype bfloat16"),
    ],
)
def test_a_workload_that_contradicts_the_model_is_refused(workload: Workload, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        model(Tracer()).resolved(workload)


def test_files_of_one_model_have_one_digest() -> None:
    config = {"model_type": "toy", "hidden_size": 8, "transformers_version": "4.1", "dtype": "float16"}
    other = {**config, "transformers_version": "5.2", "dtype": "bfloat16", "_name_or_path": "/somewhere"}
    assert model(Tracer(), config).config_digest == model(Tracer(), other).config_digest
    assert model(Tracer(), config).config_digest != model(Tracer(), {**config, "hidden_size": 9}).config_digest


def test_costs_are_traced_once_for_workloads_that_differ_in_lengths_only(tmp_path: Path) -> None:
    tracer = Tracer()
    toy = model(CostLibrary(tmp_path, tracer).find)
    for workload in (Workload(prompt_tokens=5), Workload(prompt_tokens=700, new_tokens=9), Workload(num_images=2)):
        toy.graph(toy.resolved(workload))
    assert len(tracer.asked) == 2


def test_costs_survive_in_the_cache(tmp_path: Path) -> None:
    tracer = Tracer(BY_CELL)
    for _ in range(2):
        toy = model(CostLibrary(tmp_path / "new", tracer).find)
        assert toy.graph(toy.resolved(Workload())) == replace(tracer.costs.graph, name="toy")
    assert len(tracer.asked) == 1
    assert toy.fingerprint == "f00d"


@pytest.mark.parametrize("damage", ["", "{}", '{"format": "plan-devices-costs/0"}', '{"format": 3', "[1]"])
def test_a_damaged_cache_file_is_traced_anew(tmp_path: Path, damage: str) -> None:
    tracer = Tracer()
    model(CostLibrary(tmp_path, tracer).find).resolved(Workload())
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    model(CostLibrary(tmp_path, tracer).find).resolved(Workload())
    assert len(tracer.asked) == 2
    assert json.loads(file.read_text())["fingerprint"] == "f00d"


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    toy = model(CostLibrary(blocked / "cache", Tracer()).find)
    assert toy.resolved(Workload()).num_images == 1


def test_without_a_tracer_unknown_costs_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="toy has no costs on file for batch 1, 1 images native, sdpa"):
        model(CostLibrary().find).resolved(Workload())


def test_a_folder_with_a_config_alone_is_a_model(tmp_path: Path) -> None:
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": {"image_size": 336}}))
    found = find_model(str(tmp_path), Tracer())
    assert (found.architecture, found.default_dtype, found.has_images) == (config["architectures"][0], "float16", True)
    assert found.checkpoint is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "no architectures, no model_type"),
        ({"architectures": "LlavaForConditionalGeneration"}, "not a list of class names"),
    ],
)
def test_a_config_that_names_no_model_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlannerError, match=message):
        find_model(str(tmp_path), Tracer())


def test_what_all_costs_agree_on_is_not_asked_for_again() -> None:
    tracer = Tracer()
    toy = model(CostLibrary(None, tracer).find)
    toy.resolved(Workload(num_images=2, batch_size=3))
    assert (toy.fingerprint, toy.max_positions, toy.fixed_image_px) == ("f00d", 4096, (336, 336))
    assert len(tracer.asked) == 1


@pytest.mark.parametrize(("name", "shape"), [("a.up.weight", (5, 3)), ("a.up.weight", (3, 4)), ("b.up.weight", (5, 3))])
def test_a_layer_that_is_stored_in_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    """Names that the model does not have are left to the loader, which knows how they have changed."""
    group = replace(costs(None).graph.groups[0], linears=(Linear("a.up", 4, 3),))
    graph = replace(costs(None).graph, groups=(group,))
    header = TensorHeader(shard=Path("model.safetensors"), dtype="BF16", shape=shape)
    checkpoint = Checkpoint(folder=Path(), config={}, tensors={name: header, "a.down.weight": header})
    if name == "b.up.weight":
        assert held_graph(graph, Workload(), {}, checkpoint) == graph
        return
    said = re.escape(f"model.safetensors: a.up.weight is {list(shape)}, the config says [4, 3]")
    with pytest.raises(SourceError, match=said):
        held_graph(graph, Workload(), {}, checkpoint)
