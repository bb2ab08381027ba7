"""Diagnoses of real architectures: transformers' own maps explained and repaired, ours without a false alarm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from planner import Machine
from planner.diagnosis.diagnosis import Diagnosis
from runtime import dry_run, plan_model
from runtime.diagnosis.auto_maps import STRATEGIES, auto_map
from runtime.diagnosis.diagnosis import diagnose
from vlm.inputs import example_inputs
from vlm.tiny import tiny_model

HEALTHY = "llava qwen2_vl internvl gemma3 blip mllama idefics chameleon llava_onevision vipllava".split()
COARSENINGS = ((0, 1, 2, 3), (0, 1, 1, 2), (0, 0, 1, 1), (0, 1, 1, 1))
"""Four planned devices as four, three and two."""

BROKEN_BY_AUTO = {
    ("aria", 3): ("nosplit", "hidden_states = residual + hidden_states"),
    ("git", 2): ("nosplit", "hidden_states"),
    ("glm4v", 2): ("nosplit", "self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state)"),
    ("idefics3", 3): ("nosplit", "hidden_states = residual + hidden_states"),
    ("mllama", 2): ("crosslayer", "torch.cat([hidden_states, intermediate_hidden_states]"),
    ("molmo2", 2): ("", "pooled_features[valid_token_mask]"),
    ("paligemma", 3): ("genio", "block_sequence_ids[batch_idx, q_idx]"),
    ("udop", 3): ("", "inputs_embeds += self.cell_2d_embedding(bbox)"),
}
"""By type and number of GPUs: class, where the label is not a matter of taste, and text of a line that fails."""


def roomy(model: Any, count: int) -> Machine:
    """GPUs that could each hold the model one and a half times."""
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Machine.parse(f"{count}x{int(1.5 * num_bytes)}B")


@pytest.mark.parametrize("model_type", HEALTHY)
def test_plans_of_ours_and_their_coarsenings_raise_no_false_alarm(model_type: str) -> None:
    """Putting devices together makes nothing meet that was apart."""
    model, _ = tiny_model(model_type)
    inputs = example_inputs(model)
    plan = plan_model(model, inputs, machine=Machine.parse("4x24GiB"))
    for merged in COARSENINGS:
        device_map = {module: merged[int(device)] for module, device in plan.device_map.items()}
        diagnosis = diagnose(model, inputs, device_map)
        assert diagnosis.findings == (), (merged, [finding.title for finding in diagnosis.findings])
        assert diagnosis.repair is None


@pytest.mark.parametrize(("model_type", "count"), BROKEN_BY_AUTO, ids=[name for name, _ in BROKEN_BY_AUTO])
def test_a_map_that_transformers_makes_is_explained_and_repaired(model_type: str, count: int) -> None:
    hazard, line = BROKEN_BY_AUTO[model_type, count]
    model, _ = tiny_model(model_type)
    inputs = example_inputs(model)
    diagnosis = diagnose(model, inputs, auto_map(model, "auto", roomy(model, count)))
    failing = [finding for finding in diagnosis.of("will fail") if line in finding.place]
    assert failing, [finding.place for finding in diagnosis.findings]
    assert not hazard or failing[0].hazard == hazard
    assert diagnosis.repair is not None and diagnosis.repair.proven
    assert len(set(diagnosis.repair.device_map.values())) == len(set(diagnosis.device_map.values()))


def test_a_repaired_map_computes_what_the_whole_model_does() -> None:
    model, _ = tiny_model("mllama")
    inputs = example_inputs(model)
    repair = diagnose(model, inputs, auto_map(model, "auto", roomy(model, 2))).repair
    assert repair is not None
    whole = dry_run(model, inputs, {"": 0}, hooks="accelerate")
    split = dry_run(model, inputs, repair.device_map, hooks="accelerate")
    assert all(map(torch.equal, split.results, whole.results))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_of_transformers_gives_a_map_of_the_machines_gpus(strategy: str) -> None:
    model, _ = tiny_model("llava")
    given = auto_map(model, strategy, roomy(model, 3))
    assert given.origin == strategy
    assert set(given.gpus) <= {0, 1, 2}


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="'fair' is no strategy: known are auto, balanced"):
        auto_map(tiny_model("llava")[0], "fair", Machine.parse("2x1GiB"))


def test_inputs_on_the_models_device_are_run_too_and_only_noted_where_they_work() -> None:
    model, _ = tiny_model("llava")
    entries = {"model.vision_tower": 1, "model.multi_modal_projector": 1, "model.language_model": 0, "lm_head": 0}
    diagnosis = diagnose(model, example_inputs(model), entries)
    assert model.device == next(model.model.vision_tower.parameters()).device
    assert diagnosis.safe
    (note,) = diagnosis.notes
    assert note.startswith("model.device is cuda:1, where model.vision_tower.")
    assert note.endswith("inputs are read on cuda:0. inputs.to(model.device) works, and costs copies.")


def costed(model_type: str, device_map: Any, spec: str) -> Diagnosis:
    model, _ = tiny_model(model_type)
    return diagnose(model, example_inputs(model), device_map, machine=Machine.parse(spec))


LLAVA = {"model.vision_tower": 0, "model.multi_modal_projector": 0, "model.language_model": 1, "lm_head": 1}


def test_costs_stand_beside_those_of_a_plan_of_ours() -> None:
    diagnosis = costed("llava", LLAVA, "2x2GiB")
    assert diagnosis.given is not None and diagnosis.ours is not None
    model, _ = tiny_model("llava")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for costs in (diagnosis.given, diagnosis.ours):
        assert weights <= sum(load.peak.weights_bytes for load in costs.loads) <= 1.02 * weights
        assert sum(block.num_bytes for block in costs.blocks) >= weights
        assert costs.kv_positions is not None and costs.kv_positions > 10_000
        assert sum(1 - (load.idle_decode or 0) for load in costs.loads) == pytest.approx(1)
    crossing = next(c for c in diagnosis.given.crossings if (c.source, c.phase) == ("cuda:0", "decode"))
    assert crossing.target == "cuda:1"
    assert crossing.num_bytes > 0


def test_a_gpu_that_is_too_small_is_said_to_be_by_part() -> None:
    diagnosis = costed("llava", LLAVA, "2GiB,1100MiB")
    assert diagnosis.safe
    tight = costed("llava", LLAVA, "2GiB,600MiB")
    finding = next(finding for finding in tight.findings if finding.hazard == "oom")
    assert finding.title.startswith("cuda:1 needs")
    assert "context" in finding.evidence[0]


def test_a_map_that_leaves_a_gpu_empty_is_wasteful() -> None:
    diagnosis = costed("llava", {"": 0}, "2x2GiB")
    assert diagnosis.safe
    assert any(finding.title == "cuda:1 holds nothing" for finding in diagnosis.of("wasteful"))


def test_the_table_in_docs_is_of_the_installed_versions_and_every_failure_in_it_is_repaired() -> None:
    table = (Path(__file__).parents[2] / "docs" / "auto.md").read_text(encoding="utf-8")
    if (transformers.__version__, accelerate.__version__) == ("5.23.0", "1.15.0"):
        assert f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}" in table
    found = re.search(r"\*\*(\d+) of (\d+) failing maps are repaired", table)
    assert found is not None
    assert int(found[1]) >= 0.95 * int(found[2])
    assert all(f"| {model_type} |" in table for model_type, _ in BROKEN_BY_AUTO)
