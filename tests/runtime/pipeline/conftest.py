"""One start of four processes for all that models answer in a pipeline: 4, 3 and 2 of them run each case in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, PreTrainedModel

from planner import Machine, Plan, Workload
from planner.memory import MemoryBreakdown
from runtime import load_sharded, place_inputs
from runtime.planning import plan_of_module, problem_of_module
from runtime.quiet import quiet_libraries
from tests.runtime.pipeline.jobs import ROOT, Outcomes, run_cases
from vlm.inputs import example_inputs
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint
from vlm.model import find_model
from vlm.planning import plan_for
from vlm.shrink import shrink
from vlm.tiny import from_config

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.9, "top_k": 20}
NUM_LAYERS = 4
TYPES = ("llava", "qwen3_vl", "mllama", "qwen3_vl_moe", "gemma3")
"""Beside XComposer2: masked scatter, deepstack, cross-attention, a mixture of experts, and a tied head."""
HALF = "qwen3_vl bfloat16"
LAYOUTS = ("int8", "nf4")


@dataclass
class Case:
    """A checkpoint with inputs and what one process answers to them."""

    folder: Path
    inputs: Path
    expected: list[list[int]]
    plan: Callable[[int], Plan]

    def of(self, num_stages: int, folder: Path, **more: Any) -> dict[str, Any]:
        """A job's case: this one, in so many stages."""
        path = folder / f"{self.inputs.stem}-{num_stages}.yaml"
        self.plan(num_stages).save(path)
        return {
            "num_stages": num_stages,
            "folder": str(self.folder),
            "plan": str(path),
            "inputs": str(self.inputs),
            "options": GREEDY,
            **more,
        }


@pytest.fixture(scope="session")
def cases(tiny_xcomposer2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every case by its name, with what one process answers."""
    folder = tmp_path_factory.mktemp("pipeline")
    found = {model_type: transformers_case(model_type, folder) for model_type in TYPES}
    found[HALF] = transformers_case("qwen3_vl", folder, torch.bfloat16)
    found["xcomposer2"] = xcomposer2_case(tiny_xcomposer2, folder)
    for layout in LAYOUTS:
        found[layout] = xcomposer2_case(tiny_xcomposer2, folder, quantize=layout)
    return found


@pytest.fixture(scope="session")
def outcomes(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came out of every case by its name and number of stages, and what was said at the end.

    The last case fills a device, which ends all processes.
    """
    folder = tmp_path_factory.mktemp("outcomes")
    asked: dict[tuple[str, int], dict[str, Any]] = {}
    # Every process counts the jobs that it has been in: those of the smaller ones have been in all.
    for num_stages in (4, 3, 2):
        for name in (*TYPES, "xcomposer2"):
            asked[name, num_stages] = cases[name].of(num_stages, folder)
    composer = cases["xcomposer2"]
    for num_stages in (3, 2):
        asked["seed 7", num_stages] = composer.of(num_stages, folder, options=SAMPLED, seed=7)
    asked["seed 7, one group", 2] = composer.of(2, folder, options=SAMPLED, seed=7, num_slots=1)
    asked["seed 8", 2] = composer.of(2, folder, options=SAMPLED, seed=8)
    for name in (HALF, *LAYOUTS):
        asked[name, 2] = cases[name].of(2, folder)
    folders = [str(composer.folder), str(other_checkpoint(folder))]
    asked["other checkpoint", 2] = composer.of(2, folder, folders=folders)
    script = [str(ROOT / "examples" / "answer_in_a_pipeline.py"), [cases["xcomposer2"].of(2, folder)["plan"]]]
    script[1] += [str(composer.folder), "virtual"]
    asked["example", 2] = {"num_stages": 2, "script": script}
    asked["full device", 2] = composer.of(2, folder, devices="virtual", plan=str(full_plan(composer, folder)))
    asked = dict(sorted(asked.items(), key=lambda item: -item[1]["num_stages"]))
    return run_cases(Path(asked["xcomposer2", 4]["plan"]), asked, folder)


def answers(model: Any, batches: list[dict[str, Any]], options: Mapping[str, Any] = GREEDY) -> list[list[int]]:
    """The new tokens of every request."""
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


def transformers_case(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> Case:
    """One of transformers' own models."""
    model = deep_model(model_type).to(dtype)
    name = str(dtype).removeprefix("torch.")
    batches = [example_inputs(model, seed=seed, num_images=1) for seed in range(3)]
    checkpoint = folder / f"{model_type}-{name}"
    model.save_pretrained(checkpoint, max_shard_size="200KB")
    inputs = folder / f"{model_type}-{name}.pt"
    torch.save(batches, inputs)

    def plan(num_stages: int) -> Plan:
        machine = Machine.parse(f"{num_stages}x24GiB")
        asked = Workload(new_tokens=6, dtype=name)
        return plan_of_module(model, *problem_of_module(model, batches[0], machine, asked, {}))

    return Case(checkpoint, inputs, answers(model, batches), plan)


def xcomposer2_case(checkpoint: Path, folder: Path, quantize: str = "none") -> Case:
    """Left padding, prompts of different lengths, and none, one and two pictures, in one batch and the next."""
    picture = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
    process = XComposer2Processor.from_folder(checkpoint)
    batches = [
        dict(process(["What is in the garden, please tell me?", "Hello there"], [[picture], []])),
        dict(process(["<ImageHere>and<ImageHere>The lighthouse", "Red apples"], [[picture] * 2, [picture]])),
        dict(process(["Three red apples under the old bridge"], [[]])),
    ]
    inputs = folder / f"xcomposer2-{quantize}.pt"
    torch.save(batches, inputs)
    workload = Workload(dtype="float32", batch_size=2, num_images=2, prompt_tokens=64, new_tokens=16, quantize=quantize)
    with quiet_libraries():
        whole = load_sharded(checkpoint, machine=Machine.parse("8GiB"), workload=workload, devices="cpu")
        expected = answers(whole, [place_inputs(whole, one) for one in batches])
    model = find_model(str(checkpoint))
    return Case(checkpoint, inputs, expected, lambda count: plan_for(model, Machine.parse(f"{count}x2GiB"), workload))


def other_checkpoint(folder: Path) -> Path:
    """A checkpoint of the same sizes and other values."""
    sizes = {"num_layers": 6, "hidden_size": 32, "intermediate_size": 96, "vision_layers": 2}
    return write_random_checkpoint(folder / "other", dtype="float32", max_shard_bytes=2**17, seed=5, **sizes)


def full_plan(case: Case, folder: Path) -> Path:
    """A plan whose last device holds its weights and nothing beside them, and that says nothing of it."""
    plan = case.plan(2)
    devices = list(plan.machine.devices)
    weights = plan.memory[1].weights_bytes
    own = devices[1].context_bytes + devices[1].reserve_bytes
    devices[1] = replace(devices[1], memory_bytes=own + weights + 2**16)
    memory = dict.fromkeys(plan.memory, MemoryBreakdown(weights_bytes=weights))
    replace(plan, machine=replace(plan.machine, devices=tuple(devices)), memory=memory).save(folder / "full.yaml")
    return folder / "full.yaml"
