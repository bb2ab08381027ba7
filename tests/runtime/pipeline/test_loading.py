"""What a stage holds: its own weights with values, and everybody else's as sizes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from planner import Machine, MachineError, Workload
from runtime.pipeline.cut import cut
from runtime.pipeline.flows import follow
from runtime.pipeline.loading import load_stage, refuse_unplanned_bytes, stage_map, unplanned_bytes
from runtime.planning import plan_model
from runtime.steps import forward_and_decode
from runtime.weights import META
from vlm.checkpoint import read_checkpoint
from vlm.inputs import example_inputs
from vlm.model import find_model
from vlm.skeleton import build_skeleton
from vlm.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ["llava", "gemma3", "qwen3_vl_moe"])
def test_a_stage_has_values_of_its_own_weights_and_no_memory_for_others(model_type: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    whole, _ = tiny_model(model_type)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    inputs = example_inputs(whole)
    plan = plan_model(whole, inputs, machine=Machine.parse("2x24GiB"), workload=Workload(new_tokens=4))
    parts = cut(follow(whole, inputs, forward_and_decode()), plan).parts
    expected = dict(whole.named_parameters(remove_duplicate=False))
    for part in parts:
        skeleton = build_skeleton(find_model(str(tmp_path)), dtype=torch.float32)
        places = stage_map(skeleton, part, CPU)
        read: list[int] = []
        load_stage(skeleton, read_checkpoint(tmp_path), places, read.append)
        named = dict(skeleton.named_parameters(remove_duplicate=False))
        held = {name for name, tensor in named.items() if tensor.untyped_storage().nbytes() >= tensor.nbytes}
        assert 0 < len(held) < len(named)
        assert all(torch.equal(named[name], expected[name]) for name in held)
        assert {tensor.device for tensor in named.values()} == {CPU}
        assert all(named[name].shape == expected[name].shape for name in named)
        assert sum(read) == sum({id(named[name]): named[name].nbytes for name in held}.values())
        blanks = [tensor for name, tensor in named.items() if name not in held]
        assert max(tensor.untyped_storage().nbytes() for tensor in blanks) <= 8


def test_a_tied_head_is_held_by_both_who_read_it() -> None:
    model, _ = tiny_model("gemma3")
    inputs = example_inputs(model)
    plan = plan_model(model, inputs, machine=Machine.parse("2x24GiB"), workload=Workload(new_tokens=4))
    parts = cut(follow(model, inputs, forward_and_decode()), plan).parts
    embedding = "model.language_model.embed_tokens"
    places = [stage_map(model, part, CPU) for part in parts]
    assert [place[embedding] for place in places] == [CPU, CPU]
    assert sum(place["model.language_model.layers.0"] != META for place in places) == 1


def test_what_a_copy_takes_beyond_the_plan_must_fit() -> None:
    model, _ = tiny_model("gemma3")
    machine = Machine.parse("2x24GiB")
    plan = plan_model(model, example_inputs(model), machine=machine, workload=Workload(new_tokens=4))
    parts = cut(follow(model, example_inputs(model), forward_and_decode()), plan).parts
    places = [stage_map(model, part, CPU) for part in parts]
    embedding_bytes = model.get_input_embeddings().weight.nbytes
    assert [unplanned_bytes(model, plan, stage, places[stage]) for stage in range(2)] == [0, embedding_bytes]
    refuse_unplanned_bytes(model, plan, 1, places[1], {"lm_head": (0, 1)})
    tight_bytes = plan.memory[1].total_bytes + embedding_bytes - 1
    devices = (machine.devices[0], replace(machine.devices[1], memory_bytes=tight_bytes))
    tight = replace(plan, machine=replace(machine, devices=devices))
    with pytest.raises(MachineError, match=r"stage 1 on 1 holds .* more than planned \(lm_head\), and has room for"):
        refuse_unplanned_bytes(model, tight, 1, places[1], {"lm_head": (0, 1)})
