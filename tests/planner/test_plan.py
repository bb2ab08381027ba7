"""Plans as values: what they say about the real model, and that what is written is read back, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from planner.assembly import make_plan
from planner.constraints import Constraints
from planner.errors import ConstraintError, PlanMismatchError, SourceError
from planner.graph import INPUTS, Flow, ModuleGraph, ModuleGroup
from planner.machine import Device, Machine
from planner.memory import WORKSPACE_BYTES, MemoryBreakdown
from planner.paths import contains
from planner.plan import FORMAT, Boundary, ModelSummary, Plan, Stage
from planner.polynomial import Quantities, constant, variable
from planner.problem import PlacedStage, Problem, Solution
from planner.textfile import dump_mapping
from planner.workload import Workload
from vlm.model import find_model
from vlm.planning import plan_for

COMPOSER = find_model("internlm-xcomposer2-vl-7b")
LAYERS = [f"model.layers.{i}" for i in range(32)]


def planned(spec: str, workload: Workload | None = None, **constraints: Any) -> Plan:
    return plan_for(COMPOSER, Machine.parse(spec), workload, Constraints(**constraints))


@pytest.fixture(scope="module")
def pair() -> Plan:
    return planned("2x24GiB")


@pytest.fixture(scope="module")
def hosts() -> Plan:
    return planned("a=2x8GiB/b=8GiB")


# -- the real model


def test_on_two_equal_devices_the_vision_path_stays_with_the_embedding(pair: Plan) -> None:
    assert {pair.device_map[name] for name in ("vit", "vision_proj", "model.tok_embeddings")} == {0}
    assert pair.input_devices["pixel_values"] == pair.input_devices["input_ids"] == 0


def test_on_two_equal_devices_the_layers_are_contiguous(pair: Plan) -> None:
    devices = [pair.device_map[layer] for layer in LAYERS]
    assert devices == sorted(devices) and set(devices) == {0, 1}
    assert pair.device_map["model.norm"] == pair.device_map["output"] == 1


def test_on_two_equal_devices_weights_differ_by_at_most_two_decoder_layers(pair: Plan) -> None:
    resolved = COMPOSER.resolved(Workload())
    layer = COMPOSER.graph(resolved).group("model.layers.0").weight_bytes
    first, second = (pair.memory[key].weights_bytes for key in (0, 1))
    assert abs(first - second) <= 2 * layer


@pytest.mark.parametrize(
    "workload", [None, Workload(dtype="float16"), Workload(dtype="bfloat16")], ids=["auto", "f16", "bf16"]
)
def test_one_card_that_holds_it_gets_the_whole_model(workload: Workload | None) -> None:
    plan = planned("a100-40g", workload)
    assert plan.device_map == {"": 0} and plan.boundaries == () and len(plan.stages) == 1
    assert plan.model.dtype == ("bfloat16" if workload and workload.dtype == "bfloat16" else "float16")


def test_weights_and_parameters_are_those_of_the_tensor_shapes(pair: Plan) -> None:
    assert pair.model.num_parameters == 8_666_840_064
    assert sum(part.weights_bytes for part in pair.memory.values()) == pair.model.weight_bytes == 2 * 8_666_840_064


SPECS = ["a100-40g", "2x24GiB", "24GiB,12GiB,8GiB", "8x4GiB", "a=2x8GiB/b=8GiB"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("split_vision", [False, True], ids=["together", "split vision"])
def test_every_tensor_is_covered_by_exactly_one_map_entry(spec: str, split_vision: bool) -> None:
    placement = planned(spec, split_vision=split_vision).placement
    for tensor in COMPOSER.facts.tensor_shapes():
        assert len([module for module in placement if contains(module, tensor)]) == 1, tensor


@pytest.mark.parametrize("spec", SPECS)
def test_stages_tell_the_same_as_the_map_and_use_each_device_once(spec: str) -> None:
    plan = planned(spec)
    assert len({stage.device for stage in plan.stages}) == len(plan.stages)
    for tensor in COMPOSER.facts.tensor_shapes():
        (by_map,) = [device for module, device in plan.placement.items() if contains(module, tensor)]
        (by_stage,) = [s.device for s in plan.stages if any(contains(module, tensor) for module in s.modules)]
        assert by_map == by_stage, tensor


@pytest.mark.parametrize("spec", SPECS)
def test_every_device_has_room_for_what_is_planned_on_it(spec: str) -> None:
    plan = planned(spec)
    rooms = [d.memory_bytes - m.total_bytes for d, m in zip(plan.machine.devices, plan.memory.values(), strict=True)]
    assert min(rooms) >= 0 and plan.solver.status == "OPTIMAL" and plan.solver.gap == 0
    assert plan.kv_tokens is not None
    assert plan.quantities.positions <= plan.kv_tokens <= plan.quantities.positions + plan.solver.value


def test_split_vision_lets_the_encoder_leave_but_not_the_projector() -> None:
    plan = planned("3x12GiB", split_vision=True, pins={"vit": 0, "model.tok_embeddings": 1})
    assert plan.device_map["vit"] == 0
    assert plan.device_map["vision_proj"] == plan.device_map["model.tok_embeddings"] == 1


def test_without_images_nothing_is_encoded_and_no_position_is_an_image() -> None:
    blind, seeing = planned("2x24GiB", Workload(num_images=0)), planned("2x24GiB")
    assert (blind.quantities.images, blind.quantities.patches, blind.quantities.image_tokens) == (0, 0, 0)
    assert blind.quantities.positions == 1024 and seeing.quantities.positions == 1024 + 1225


def test_a_context_shorter_than_the_request_is_refused_with_the_sum() -> None:
    with pytest.raises(ConstraintError) as caught:
        planned("2x24GiB", Workload(max_model_len=2248))
    assert str(caught.value) == (
        "max_model_len 2248 is shorter than the request: 512 prompt + 1225 image + 512 new = 2249 positions. "
        "Raise --max-model-len to 2249 or ask for less."
    )
    assert planned("2x24GiB", Workload(max_model_len=2249)).quantities.positions == 2249


def test_the_same_question_gives_the_same_bytes() -> None:
    assert planned("24GiB,12GiB,8GiB").to_yaml() == planned("24GiB,12GiB,8GiB").to_yaml()


# -- workloads


REFUSED_WORKLOADS: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
    "negative images": ({"num_images": -1}, "num_images is -1: it must be at least 0"),
    "no prompt": ({"prompt_tokens": 0}, "prompt_tokens is 0: it must be at least 1"),
    "no new tokens": ({"new_tokens": 0}, "new_tokens is 0: it must be at least 1"),
    "no cache": ({"max_model_len": 0}, "max_model_len is 0: it must be at least 1"),
    "a flat image": ({"image_size": (640, 0)}, r"image_size is \(640, 0\): width and height are at least 1 pixel"),
    "an unknown dtype": ({"dtype": "int8"}, "dtype is 'int8': known are auto, float16, bfloat16, float32"),
    "an unknown KV dtype": ({"kv_dtype": "fp8"}, "kv_dtype is 'fp8': known are auto, float16, bfloat16, float32"),
    "unknown attention": ({"attention": "flash"}, "attention is 'flash': known are sdpa, eager"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED_WORKLOADS.values(), ids=REFUSED_WORKLOADS)
def test_a_workload_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**values)


# -- device maps and hosts


def test_a_device_map_on_one_host_has_integers(pair: Plan) -> None:
    assert {type(device) for device in pair.device_map.values()} == {int}
    assert {type(device) for device in planned("a=2x24GiB").device_map.values()} == {int}


def test_a_device_map_uses_the_devices_own_indices() -> None:
    machine = Machine(devices=tuple(Device(index=index, memory_bytes=24 * 2**30) for index in (3, 1)))
    plan = plan_for(COMPOSER, machine)
    assert plan.device_map["vit"] == 3 and plan.device_map["output"] == 1 and set(plan.memory) == {3, 1}


def test_over_several_hosts_there_is_no_single_device_map(hosts: Plan) -> None:
    with pytest.raises(ValueError, match=r"the plan spans hosts a, b: use device_map_for\(host\)"):
        _ = hosts.device_map


def test_each_host_has_its_own_part_of_the_map_with_its_own_indices(hosts: Plan) -> None:
    parts = {host: hosts.device_map_for(host) for host in ("a", "b")}
    assert parts["a"]["vit"] == 0 and parts["b"]["output"] == 0
    assert set(parts["a"].values()) == {0, 1} and set(parts["b"].values()) == {0}
    assert set(hosts.placement) == set(parts["a"]) | set(parts["b"])
    assert hosts.placement["vit"] == "a/cuda:0" and hosts.placement["output"] == "b/cuda:0"


@pytest.mark.parametrize(("spec", "known"), [("a=24GiB/b=24GiB", "a, b"), ("24GiB", "unnamed")])
def test_an_unknown_host_is_refused(spec: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"no host 'c' in this plan: hosts are {known}"):
        planned(spec).device_map_for("c")


def test_on_one_unnamed_host_the_part_is_the_whole(pair: Plan) -> None:
    assert pair.device_map_for("") == pair.device_map


# -- boundaries, worked out by hand


def group(name: str) -> ModuleGroup:
    return ModuleGroup(id=name, modules=(name,), role="decoder_layer", weight_bytes=10, num_parameters=1)


def flow(tensor: str, phase: Any, num_bytes: Any, producer: str, *consumers: str) -> Flow:
    return Flow(tensor=tensor, producer=producer, consumers=consumers, phase=phase, num_bytes=num_bytes)


def toy_plan(*flows: Flow) -> Plan:
    """Groups a, b on device 0 and c, d, e on device 1, for 7 text tokens."""
    graph = ModuleGraph(name="toy", dtype="float16", groups=tuple(map(group, "abcde")), flows=flows)
    machine = Machine(
        devices=tuple(
            Device(index=i, memory_bytes=WORKSPACE_BYTES + 100, context_bytes=0, reserve_bytes=0) for i in (0, 1, 2)
        )
    )
    counts = Quantities(batch=1, images=0, patches=0, text_tokens=7, image_tokens=0, positions=8)
    stages = (PlacedStage(device=0, members=(0, 1)), PlacedStage(device=1, members=(2, 3, 4)))
    solution = Solution(status="OPTIMAL", stages=stages, value=0, bound=0, method="by hand")
    summary = ModelSummary(name="toy", architecture="Toy", num_parameters=5, weight_bytes=50, dtype="float16")
    return make_plan(Problem.of(graph, machine, counts), solution, model=summary, workload=Workload(), fingerprint="f")


def crossing(plan: Plan) -> list[tuple[str, str, Any, Any, int]]:
    return [(b.phase, b.tensor, b.source, b.target, b.num_bytes) for b in plan.boundaries]


def test_a_tensor_with_many_readers_crosses_once_per_destination_device() -> None:
    plan = toy_plan(flow("mask", "prefill", constant(5), "a", "b", "c", "d", "e"))
    assert crossing(plan) == [("prefill", "mask", 0, 1, 5)]


def test_a_tensor_crosses_once_per_phase_with_that_phases_bytes() -> None:
    prefill = flow("hidden", "prefill", 2 * variable("text_tokens"), "b", "c")
    plan = toy_plan(prefill, flow("hidden", "decode", constant(2), "b", "c"))
    assert crossing(plan) == [("prefill", "hidden", 0, 1, 14), ("decode", "hidden", 0, 1, 2)]


def test_tensors_that_stay_on_their_device_and_inputs_cross_nothing() -> None:
    plan = toy_plan(
        flow("hidden", "prefill", constant(1), "a", "b"), flow("input_ids", "prefill", constant(1), INPUTS, "a")
    )
    assert plan.boundaries == ()


def test_results_return_to_the_device_that_takes_the_prompt() -> None:
    inputs = (
        flow("pixels", "encode", constant(1), INPUTS, "c"),
        flow("input_ids", "prefill", constant(1), INPUTS, "b"),
    )
    plan = toy_plan(*inputs, flow("logits", "decode", constant(9), "e", INPUTS))
    assert plan.input_devices == {"pixels": 1, "input_ids": 0}
    assert crossing(plan) == [("decode", "logits", 1, 0, 9)]


def test_an_input_with_many_readers_goes_to_the_first() -> None:
    plan = toy_plan(flow("input_ids", "prefill", constant(1), INPUTS, "b", "c"))
    assert plan.input_devices == {"input_ids": 0} and plan.boundaries == ()


def test_a_model_without_kv_cache_has_no_kv_capacity_and_unused_devices_cost_nothing() -> None:
    plan = toy_plan()
    assert plan.kv_tokens is None and plan.memory[2] == MemoryBreakdown()
    assert plan.device_map == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1}


# -- files


WRITTEN = {
    "two devices": ("2x24GiB", Workload()),
    "three devices": ("24GiB,12GiB,8GiB", Workload(batch_size=2, max_model_len=4096)),
    "one device": ("a100-40g", Workload(dtype="bfloat16", attention="eager")),
    "two hosts": ("a=2x8GiB/b=8GiB", Workload(num_images=0)),
    "an image size": ("2xrtx4090", Workload(image_size=(640, 480), kv_dtype="float16")),
}


@pytest.mark.parametrize(("spec", "workload"), WRITTEN.values(), ids=WRITTEN)
def test_a_plan_survives_yaml_and_gives_the_same_bytes_again(spec: str, workload: Workload, tmp_path: Path) -> None:
    plan = planned(spec, workload)
    plan.save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert loaded == plan and loaded == Plan.from_yaml(plan.to_yaml())
    assert loaded.to_yaml() == plan.to_yaml() == (tmp_path / "plan.yaml").read_text()


@pytest.mark.parametrize(("spec", "workload"), WRITTEN.values(), ids=WRITTEN)
def test_a_plan_survives_json(spec: str, workload: Workload, tmp_path: Path) -> None:
    plan = planned(spec, workload)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_file_has_the_documented_keys_in_their_order(pair: Plan) -> None:
    content = pair.to_dict()
    assert list(content) == [
        *("format", "model", "machine", "workload", "quantities", "device_map", "input_devices", "stages"),
        *("boundaries", "memory", "capacity", "estimate", "solver", "proof", "fingerprints"),
    ]
    assert content["format"] == FORMAT == "plan-devices/1"
    parts = ["weights", "kv_cache", "activations", "logits", "buffers", "workspace", "context", "reserve", "total"]
    assert list(content["memory"][0]) == [f"{part}_bytes" for part in parts]


def test_a_plan_of_a_known_model_says_what_its_proof_covers_and_has_no_times(pair: Plan) -> None:
    content = pair.to_dict()
    assert (content["proof"]["status"], content["proof"]["hooks"]) == ("proven", "ours, accelerate")
    assert content["proof"]["workload_class"] == "with images, one sequence, sdpa attention, dynamic cache, one beam"
    assert set(content["estimate"].values()) == {None}


NEEDED = [
    *("model", "machine", "workload", "quantities", "device_map", "input_devices", "stages", "boundaries", "memory"),
    *("capacity", "solver", "proof", "fingerprints"),
]


def refusal(content: dict[str, Any], folder: Path) -> str:
    path = folder / "plan.yaml"
    path.write_text(dump_mapping(content))
    with pytest.raises(SourceError) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value) and caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize("key", NEEDED)
def test_a_plan_that_lacks_a_part_is_refused_by_its_name(pair: Plan, key: str, tmp_path: Path) -> None:
    content = {name: value for name, value in pair.to_dict().items() if name != key}
    text = refusal(content, tmp_path)
    assert f"is damaged: lacks '{key}'. Make it anew with plan-devices MODEL -o FILE" in text


@pytest.mark.parametrize("form", [None, "plan-devices/2", "module-graph/1", 1], ids=str)
def test_a_file_of_another_format_is_refused(pair: Plan, form: Any, tmp_path: Path) -> None:
    text = refusal({**pair.to_dict(), "format": form}, tmp_path)
    assert f"has format {form!r}: this version reads plan-devices/1" in text


DAMAGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown key of the model": lambda c: c["model"].update(color="red"),
    "the model lacks its name": lambda c: c["model"].pop("name"),
    "the model is a list": lambda c: c.update(model=["x"]),
    "the machine has no devices": lambda c: c["machine"].update(devices=[]),
    "a device without memory": lambda c: c["machine"]["devices"][0].pop("memory"),
    "the machine is a text": lambda c: c.update(machine="2x24GiB"),
    "an unknown dtype": lambda c: c["workload"].update(dtype="int8"),
    "a batch of text": lambda c: c["workload"].update(batch_size="many"),
    "an image size of text": lambda c: c["workload"].update(image_size=5),
    "a negative count": lambda c: c["quantities"].update(positions=-1),
    "a count too many": lambda c: c["quantities"].update(frames=1),
    "a stage without modules": lambda c: c["stages"][0].pop("modules"),
    "a stage that is a text": lambda c: c.update(stages=["x"]),
    "stages that are a number": lambda c: c.update(stages=5),
    "a boundary without its phase": lambda c: c["boundaries"][0].pop("phase"),
    "memory without a part": lambda c: c["memory"][1].pop("logits_bytes"),
    "memory of text": lambda c: c["memory"][1].update(logits_bytes="much"),
    "memory that is a list": lambda c: c.update(memory=[1, 2]),
    "a capacity that is a list": lambda c: c.update(capacity=[]),
    "a solver without a status": lambda c: c["solver"].pop("status"),
    "no fingerprint of the model": lambda c: c["fingerprints"].pop("model"),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_plan_is_refused(pair: Plan, change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    content = deepcopy(pair.to_dict())
    change(content)
    assert "is damaged: " in refusal(content, tmp_path)


def test_a_plan_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="plan .*absent.yaml cannot be read: No such file or directory"):
        Plan.load(tmp_path / "absent.yaml")


def test_a_plan_for_other_weights_is_refused_with_both_fingerprints(pair: Plan) -> None:
    pair.check_model(COMPOSER.fingerprint, "folder")
    with pytest.raises(PlanMismatchError) as caught:
        pair.check_model("0123", "other-folder")
    assert str(caught.value) == (
        f"the plan is for internlm-xcomposer2-vl-7b ({pair.fingerprint}), and other-folder has other weights (0123). "
        "Plan that checkpoint: plan-devices other-folder --gpus ..."
    )
    assert caught.value.exit_code == 3


def test_the_values_of_a_plan_are_frozen(pair: Plan) -> None:
    for value in (pair, pair.stages[0], pair.boundaries[0], pair.solver, pair.model):
        with pytest.raises(AttributeError):
            setattr(value, fields(value)[0].name, None)
    assert isinstance(pair.stages[0], Stage) and isinstance(pair.boundaries[0], Boundary)
