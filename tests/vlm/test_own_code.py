"""Checkpoints of architectures that nobody here has a class for: by their names alone, and by their own code."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from planner import Machine, ModuleGraph, NoClassError, Plan, SourceError, UnsupportedModelError, Workload
from planner.cli.main import main
from planner.memory import CostTable
from runtime import load_sharded, place_inputs
from runtime.costs import trace_costs
from tests.hub_server import hub_server
from vlm.by_names.facts import facts_of
from vlm.by_names.parts import parts_of
from vlm.cost_library import CostLibrary
from vlm.hub import Hub
from vlm.inputs import example_inputs
from vlm.model import find_model
from vlm.own_code import own_classes
from vlm.planning import plan_for
from vlm.tiny import tiny_model

CODE = Path(__file__).parents[1] / "own_code"
AUTO_MAP = {
    "AutoConfig": "configuration_garden.GardenConfig",
    "AutoModel": "modeling_garden.GardenModel",
    "AutoModelForImageTextToText": "modeling_garden.GardenForConditionalGeneration",
}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIG = {
    "architectures": ["GardenForConditionalGeneration"],
    "model_type": "garden",
    "auto_map": AUTO_MAP,
    "text_config": {**TEXT, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 2048},
    "vision_config": {"hidden_size": 32, "num_layers": 3, "image_size": 28, "patch_size": 7},
    "image_token_id": 7,
}


def whole_model(folder: Path) -> PreTrainedModel:
    config_class, model_class = own_classes(folder, CONFIG)
    torch.manual_seed(0)
    return model_class(config_class.from_dict(dict(CONFIG))).eval()


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "garden"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("configuration_garden.py", "modeling_garden.py"):
        shutil.copy(CODE / name, folder)
    weights = {name: tensor.contiguous() for name, tensor in whole_model(folder).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PLAN_DEVICES_CACHE", str(tmp_path / "cache"))
    yield
    gc.collect()


# -- by names alone


def test_without_trust_a_plan_is_made_by_names_and_says_what_it_assumes(
    garden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(garden), "--gpus", "2x2GiB", "-o", str(tmp_path / "plan.yaml")]) == 0
    error = capsys.readouterr().err
    plan = Plan.load(tmp_path / "plan.yaml")
    assert plan.proof["status"] == "unproven"
    assert [stage.device for stage in plan.stages] == [0, 1]
    assert any("28 x 28 pixels and 16 positions" in line for line in plan.assumptions)
    assert "Assumed: parts, their order" in error
    assert "--trust-remote-code" in error
    assert Plan.from_yaml(plan.to_yaml()) == plan


def test_a_plan_by_names_covers_every_weight_and_keeps_the_merge_together(garden: Path) -> None:
    model = find_model(str(garden), CostLibrary(tracer=trace_costs).find)
    plan = plan_for(model, Machine.parse("2x2GiB"))
    assert model.checkpoint is not None
    device_of = {name: plan.device_map[_entry(name, plan.device_map)] for name in model.checkpoint.tensors}
    merged = {device for name, device in device_of.items() if "layers" not in name and "head" not in name}
    assert merged - {device_of["model.language_model.norm.weight"]} <= {0}
    assert {device_of[f"model.language_model.layers.{i}.mlp.up_proj.weight"] for i in range(4)} == {0, 1}


def _entry(name: str, device_map: Mapping[str, Any]) -> str:
    return max((key for key in device_map if name == key or name.startswith(f"{key}.")), key=len)


@pytest.mark.parametrize("model_type", ["llava", "internvl", "idefics3", "qwen2_5_vl", "glm4v"])
def test_names_of_known_models_give_their_weights_cache_and_no_less_than_a_trace_found(
    model_type: str, tmp_path: Path
) -> None:
    model, config = tiny_model(model_type, dtype=torch.bfloat16)
    folders = {}
    for kind in ("known", "unknown"):
        folders[kind] = tmp_path / kind
        folders[kind].mkdir()
        tied = dict.fromkeys(model.all_tied_weights_keys)
        weights = {name: value.clone() for name, value in model.state_dict().items() if name not in tied}
        save_file(weights, folders[kind] / "model.safetensors")
        changed = {"model_type": "nobody", "architectures": ["Nobody"]} if kind == "unknown" else {}
        (folders[kind] / "config.json").write_text(json.dumps({**config.to_dict(), **changed}, default=str))
    workload = Workload(num_images=0, prompt_tokens=500, new_tokens=20)
    graphs, parts = {}, {}
    for kind, folder in folders.items():
        graphs[kind], parts[kind] = _on_one_device(folder, workload)
    assert graphs["unknown"].num_parameters == graphs["known"].num_parameters
    assert parts["unknown"]["kv_cache"] >= parts["known"]["kv_cache"] > 0
    peak = {kind: found["activations"] + found["logits"] + found["buffers"] for kind, found in parts.items()}
    assert peak["known"] <= peak["unknown"] <= 4 * peak["known"]


def _on_one_device(folder: Path, workload: Workload) -> tuple[ModuleGraph, Mapping[str, int]]:
    model = find_model(str(folder), CostLibrary(tracer=trace_costs).find)
    resolved = model.resolved(workload)
    graph = model.graph(resolved)
    table = CostTable.of(graph, model.quantities(resolved))
    return graph, table.on_device(range(len(graph.groups)), Machine.parse("64GiB").devices[0]).parts


def test_parts_are_found_under_the_names_of_several_code_bases() -> None:
    shapes = {
        "transformer.embedding.word_embeddings.weight": (256, 64),
        "transformer.vision.boi": (1, 1, 64),
        "transformer.vision.transformer.layers.0.attention.query_key_value.weight": (96, 32),
        **{
            f"transformer.encoder.layers.{i}.{name}": shape
            for i in range(3)
            for name, shape in {
                "input_layernorm.weight": (64,),
                "self_attention.query_key_value.weight": (96, 64),
                "self_attention.dense.weight": (64, 64),
                "mlp.dense_h_to_4h.weight": (128, 64),
            }.items()
        },
        "transformer.encoder.final_layernorm.weight": (64,),
        "transformer.output_layer.weight": (256, 64),
        "mlp1.0.weight": (64, 32),
        "mlp1.2.weight": (64, 64),
    }
    parts = parts_of(shapes)
    roles = [(part.modules[0], part.role) for part in parts]
    assert roles[-5:] == [
        *((f"transformer.encoder.layers.{i}", "decoder_layer") for i in range(3)),
        ("transformer.encoder.final_layernorm", "norm"),
        ("transformer.output_layer", "head"),
    ]
    assert ("mlp1", "projector") in roles
    assert ("transformer.vision.boi", "vision_encoder") in roles
    facts = facts_of({"num_attention_heads": 4}, parts)
    assert facts.kv_width(parts[-3].shapes) == 32  # 96 rows of queries, keys and values, less 64 of queries
    assert sum(part.num_parameters for part in parts) == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_of_experts_only_those_count_that_a_position_is_sent_to() -> None:
    layer = {f"model.layers.{i}.mlp.experts.{e}.up.weight": (32, 16) for i in range(2) for e in range(8)}
    packed = {f"model.layers.{i}.mlp.experts.down": (8, 32, 16) for i in range(2)}
    shapes = {"model.embed_tokens.weight": (64, 16), **layer, **packed}
    parts = parts_of(shapes)
    facts = facts_of({"num_experts_per_tok": 2}, parts)
    assert facts.matrices(parts[-1].shapes) == [(32, 16)] * 4


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.embed_tokens.weight": (64, 16)}, "no list of decoder layers"),
        ({f"model.layers.{i}.w{j}.weight": (16, 16) for i in range(2) for j in range(4)}, "of a token embedding"),
    ],
)
def test_weights_of_no_decoder_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parts_of(shapes)


def test_pictures_of_unknown_size_are_asked_for_as_text(garden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(garden, tmp_path / "blind")
    config = {**CONFIG, "vision_config": {"depth": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    model = find_model(str(folder), CostLibrary(tracer=trace_costs).find)
    with pytest.raises(UnsupportedModelError, match="--num-images 0"):
        plan_for(model, Machine.parse("2x2GiB"))
    assert plan_for(model, Machine.parse("2x2GiB"), Workload(num_images=0, prompt_tokens=700)).kv_tokens


# -- by its own code


def test_with_trust_it_is_traced_proven_loaded_and_answers_as_the_whole_model(garden: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.yaml"
    arguments = [str(garden), "--gpus", "2x2GiB", "--trust-remote-code", "--dtype", "float32", "-o", str(plan_file)]
    assert main(arguments) == 0
    plan = Plan.load(plan_file)
    assert (plan.proof["status"], plan.assumptions) == ("proven", ())
    assert {stage.device for stage in plan.stages} == {0, 1}
    whole = whole_model(garden)
    inputs = example_inputs(whole, batch_size=1, num_images=1, text_tokens=12)
    split = load_sharded(str(garden), plan, devices="virtual", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(split(**place_inputs(split, inputs)).logits.cpu(), whole(**inputs).logits)
    sampled = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = split.generate(**place_inputs(split, inputs), **sampled)
    assert torch.equal(tokens.cpu(), whole.generate(**inputs, **sampled))


def test_code_is_neither_run_nor_downloaded_without_trust(garden: Path, tmp_path: Path) -> None:
    plan = plan_for(find_model(str(garden), CostLibrary(tracer=trace_costs).find), Machine.parse("2x2GiB"))
    with pytest.raises(NoClassError, match="--trust-remote-code"):
        load_sharded(str(garden), plan, devices="virtual")
    with hub_server() as server:
        server.repos["somebody/garden"] = garden
        for trusted in (False, True):
            hub = Hub(endpoint=server.url, cache=tmp_path / str(trusted), with_code=trusted)
            checkpoint = hub.checkpoint("somebody/garden")
            assert (checkpoint.code is not None) is trusted
            fetched = [line for line in server.requests if ".py" in line]
            assert bool(fetched) is trusted
        costs = find_model("somebody/garden", CostLibrary(tracer=trace_costs).find, hub.checkpoint)
        assert plan_for(costs, Machine.parse("2x2GiB")).assumptions == ()


def test_other_code_is_another_question(garden: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(garden, tmp_path / "changed")
    with (changed / "modeling_garden.py").open("a") as file:
        file.write("\n# another version\n")
    digests = {find_model(str(folder), trust_remote_code=True).config_digest for folder in (garden, changed)}
    assert len(digests | {find_model(str(garden)).config_digest}) == 3


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        ({"AutoConfig": AUTO_MAP["AutoConfig"]}, "AutoConfig and one of"),
        ({**AUTO_MAP, "AutoModelForImageTextToText": "elsewhere--modeling.Model"}, "none of elsewhere"),
        ({**AUTO_MAP, "AutoModelForImageTextToText": "../evil.Model"}, "none of elsewhere"),
        ({**AUTO_MAP, "AutoModelForImageTextToText": "modeling_tree.Model"}, "no modeling_tree.py beside it"),
    ],
)
def test_code_that_is_not_beside_the_config_is_refused(garden: Path, auto_map: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        own_classes(garden, {**CONFIG, "auto_map": auto_map})


def test_code_that_cannot_be_imported_says_why(garden: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(garden, tmp_path / "broken")
    (broken / "modeling_garden.py").write_text("import no_such_package\n")
    with pytest.raises(UnsupportedModelError, match="cannot be run here.*no_such_package"):
        own_classes(broken, CONFIG)


def test_the_command_needs_no_answer_on_its_standard_input(garden: Path) -> None:
    command = [sys.executable, "-m", "planner", "run", str(garden), "--gpus", "2x2GiB", "--devices", "cpu"]
    done = subprocess.run(
        [*command, "--prompt", "What is in the garden?"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 3
    assert "no processor or tokenizer" in done.stderr
