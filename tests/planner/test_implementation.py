"""Profiles of other code: what their habits add, to the byte, and where it shows."""

from __future__ import annotations

from typing import Any

import pytest

from planner import ConstraintError, Machine, Plan, Workload
from planner.cli.main import main
from planner.implementation import IMPLEMENTATIONS, OURS
from vlm.model import find_model
from vlm.planning import plan_for

CARD = Machine.parse("a100-80g")
MIB = 2**20


def planned(name: str, implementation: str, **workload: Any) -> Plan:
    return plan_for(find_model(name), CARD, Workload(implementation=implementation, **workload))


def test_every_profile_says_where_it_is_known_from() -> None:
    assert all(one.source for one in IMPLEMENTATIONS.values())
    assert IMPLEMENTATIONS[OURS].habits == "as ours"
    assert IMPLEMENTATIONS["internlm-xcomposer2"].habits == (
        "logits of the prompt and float32, rotary tables in every layer, a cache that grows whole"
    )


def test_rotary_tables_of_every_layer_are_half_a_gibibyte() -> None:
    """32 layers, a cosine and a sine of 128 numbers in 16 bits for each of 32,768 positions."""
    ours, theirs = (planned("internlm-xcomposer2-vl-7b", name) for name in (OURS, "internlm-xcomposer2"))
    assert theirs.memory[0].buffers_bytes - ours.memory[0].buffers_bytes == 512 * MIB


def test_logits_of_a_prompt_are_its_peak_in_16_bits_and_in_float32() -> None:
    prompt = 3000
    ours, theirs = (
        planned("internlm2-7b", name, num_images=0, prompt_tokens=prompt, new_tokens=1)
        for name in (OURS, "internlm-xcomposer2")
    )
    assert theirs.memory[0].activations_bytes == prompt * 92544 * (2 + 4)
    assert ours.memory[0].activations_bytes < theirs.memory[0].activations_bytes / 2


def test_a_cache_that_grows_whole_is_there_twice() -> None:
    answer = 30000
    ours, theirs = (
        planned("internlm2-7b", name, num_images=0, prompt_tokens=16, new_tokens=answer)
        for name in (OURS, "internlm-xcomposer2")
    )
    assert ours.memory[0].kv_cache_bytes == theirs.memory[0].kv_cache_bytes == (answer + 16) * 131072
    assert theirs.memory[0].activations_bytes == ours.memory[0].kv_cache_bytes


def test_an_engine_launches_nothing_and_copies_no_cache() -> None:
    eager, engine = (planned("llava-1.5-7b-hf", name, num_images=0, prompt_tokens=512) for name in (OURS, "engine"))
    assert eager.estimate.tpot_s and engine.estimate.tpot_s
    # 13.5 GB of weights and 768 positions of half a MiB, read once at 0.75 of 2039 GB/s.
    assert engine.estimate.tpot_s == pytest.approx((13.2e9 + 768 * 2**19) / (0.75 * 2039e9), rel=0.03)
    assert engine.estimate.tpot_s < eager.estimate.tpot_s / 2


def test_plans_for_other_code_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "internlm-xcomposer2-vl-7b --gpus 24GiB,12GiB --no-proof --implementation internlm-xcomposer2"
    assert main(arguments.split()) == 0
    captured = capsys.readouterr()
    assert "as the code of internlm-xcomposer2 takes memory: logits of the prompt" in " ".join(captured.err.split())
    assert "implementation: internlm-xcomposer2" in captured.out


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="implementation is 'vllm': known are ours, internlm-xcomposer2"):
        Workload(implementation="vllm")


def test_habits_without_numbers_for_them_are_refused() -> None:
    with pytest.raises(ConstraintError, match="config of llama-3.2-11b-vision-instruct does not say vocab_size"):
        planned("llama-3.2-11b-vision-instruct", "internlm-xcomposer2")
