"""The same tokens from 2, 3 and 4 processes as from one, for five architectures; and what each process has read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, PreTrainedModel

from planner import Machine, Plan, Workload
from runtime import load_sharded, place_inputs
from runtime.planning import plan_model
from tests.runtime.pipeline.jobs import run_cases
from vlm.inputs import example_inputs
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.model import find_model
from vlm.planning import plan_for
from vlm.shrink import shrink
from vlm.tiny import from_config

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.9, "top_k": 20}
NUM_LAYERS = 4
TYPES = ("llava", "qwen3_vl", "mllama", "qwen3_vl_moe", "gemma3")
"""Beside XComposer2: masked scatter, deepstack, cross-attention, a mixture of experts, and a tied head."""


@dataclass
class Case:
    """A checkpoint with inputs and what one process answers to them."""

    folder: Path
    inputs: Path
    expected: list[list[int]]
    plan: Callable[[int], Plan]

    def of(self, num_stages: int, folder: Path, **more: Any) -> dict[str, Any]:
        path = folder / f"{self.folder.name}-{num_stages}.yaml"
        self.plan(num_stages).save(path)
        return {
            "folder": str(self.folder),
            "plan": str(path),
            "inputs": str(self.inputs),
            "options": GREEDY,
            **more,
        }


def answers(model: Any, batches: list[dict[str, Any]], options: Mapping[str, Any] = GREEDY) -> list[list[int]]:
    found = []
    for inputs in batches:
        found += model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    return found


def deep_model(model_type: str) -> PreTrainedModel:
    """A tiny model of four decoder layers, so that four stages have some each."""
    config = shrink(CONFIG_MAPPING[model_type]())
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[index % len(text.layer_types)] for index in range(NUM_LAYERS)]
    text.num_hidden_layers = NUM_LAYERS
    return from_config(config)


def transformers_case(model_type: str, folder: Path) -> Case:
    model = deep_model(model_type)
    batches = [example_inputs(model, seed=seed, num_images=1) for seed in range(3)]
    model.save_pretrained(folder / model_type, max_shard_size="200KB")
    inputs = folder / f"{model_type}.pt"
    torch.save(batches, inputs)

    def plan(num_stages: int) -> Plan:
        machine = Machine.parse(f"{num_stages}x24GiB")
        return plan_model(model, batches[0], machine=machine, workload=Workload(new_tokens=6))

    return Case(folder / model_type, inputs, answers(model, batches), plan)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("pipeline")
    return {model_type: transformers_case(model_type, folder) for model_type in TYPES}


@pytest.fixture(scope="module")
def xcomposer2(tiny_xcomposer2: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Uneven prompts, so that there is padding on the left, and groups of other sizes and other numbers of images."""
    picture = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    processor = XComposer2Processor.from_folder(tiny_xcomposer2)
    asked = (
        (["What is in the garden?", "Who holds the umbrella under the old bridge, and why?"], [[picture], [picture]]),
        (["<ImageHere>and<ImageHere>The lighthouse"], [[picture, picture]]),
        (["Three red apples", "Rain"], [[], []]),
        (["The train to the coast"], [[picture]]),
    )
    batches = [dict(processor(prompts, images)) for prompts, images in asked]
    inputs = tmp_path_factory.mktemp("xcomposer2") / "inputs.pt"
    torch.save(batches, inputs)
    workload = Workload(dtype="float32", batch_size=2, num_images=2, prompt_tokens=64, new_tokens=16)
    whole = load_sharded(tiny_xcomposer2, machine=Machine.parse("8GiB"), workload=workload, devices="cpu")
    expected = answers(whole, [place_inputs(whole, one) for one in batches])
    model = find_model(str(tiny_xcomposer2))
    return Case(
        tiny_xcomposer2, inputs, expected, lambda count: plan_for(model, Machine.parse(f"{count}x2GiB"), workload)
    )


Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(cases: dict[str, Case], xcomposer2: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcomes]:
    """What came out of every case, by the number of processes and name: one start for each number."""
    found: dict[int, Outcomes] = {}
    for num_stages in (2, 3, 4):
        folder = tmp_path_factory.mktemp(f"{num_stages}-stages")
        asked = {name: case.of(num_stages, folder) for name, case in cases.items()}
        asked["xcomposer2"] = xcomposer2.of(num_stages, folder)
        if num_stages < 4:
            asked["seed 7"] = xcomposer2.of(num_stages, folder, options=SAMPLED, seed=7)
        if num_stages == 2:
            asked["seed 7, one group"] = xcomposer2.of(2, folder, options=SAMPLED, seed=7, num_slots=1)
            asked["seed 8"] = xcomposer2.of(2, folder, options=SAMPLED, seed=8)
        found[num_stages] = dict(zip(asked, run_cases(num_stages, list(asked.values()), folder), strict=True))
    return found


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("name", [*TYPES, "xcomposer2"])
def test_greedy_tokens_are_those_of_one_process(
    cases: dict[str, Case], xcomposer2: Case, outcomes: dict[int, Outcomes], name: str, num_stages: int
) -> None:
    case, outcome = {**cases, "xcomposer2": xcomposer2}[name], outcomes[num_stages][name]
    assert [outcome["answers"][index] for index in range(len(case.expected))] == case.expected
    assert [0, "encode"] in outcome["phases"]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("name", [*TYPES, "xcomposer2"])
def test_each_process_reads_its_own_weights_alone(
    cases: dict[str, Case], xcomposer2: Case, outcomes: dict[int, Outcomes], name: str, num_stages: int
) -> None:
    read_bytes = outcomes[num_stages][name]["read_bytes"].values()
    stored = {**cases, "xcomposer2": xcomposer2}[name].folder.glob("*.safetensors")
    stored_bytes = sum(path.stat().st_size for path in stored)
    assert len(read_bytes) == num_stages
    assert max(read_bytes) < 0.95 * stored_bytes
    # A tied head is read where the embedding is, and where it runs.
    assert sum(read_bytes) <= (1.5 if name == "gemma3" else 1.0) * stored_bytes


def test_sampling_depends_on_the_seed_and_not_on_stages_or_groups(outcomes: dict[int, Outcomes]) -> None:
    two = {name: outcome["answers"] for name, outcome in outcomes[2].items()}
    assert two["seed 7"] == two["seed 7, one group"] == outcomes[3]["seed 7"]["answers"]
    assert two["seed 7"] != two["seed 8"]
    assert two["seed 7"] != two["xcomposer2"]
