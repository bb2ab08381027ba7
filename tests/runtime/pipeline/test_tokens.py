"""The same tokens from 2, 3 and 4 processes as from one, for six architectures; and what each process has read."""

from __future__ import annotations

import pytest

from tests.runtime.pipeline.conftest import HALF, LAYOUTS, TYPES, Case
from tests.runtime.pipeline.jobs import Outcomes, messages

pytestmark = pytest.mark.xdist_group("pipeline")
NAMES = (*TYPES, "xcomposer2")


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_one_process(
    cases: dict[str, Case], outcomes: Outcomes, name: str, num_stages: int
) -> None:
    outcome, expected = outcomes[name, num_stages], cases[name].expected
    assert [outcome["answers"][index] for index in range(len(expected))] == expected
    assert [0, "encode"] in outcome["phases"]


@pytest.mark.parametrize("name", [HALF, *LAYOUTS])
def test_so_are_they_in_half_precision_and_in_fewer_bits_in_equal_batches(
    cases: dict[str, Case], outcomes: Outcomes, name: str
) -> None:
    expected = cases[name].expected
    assert [outcomes[name, 2]["answers"][index] for index in range(len(expected))] == expected


def test_weights_in_fewer_bits_answer_otherwise(cases: dict[str, Case]) -> None:
    """Else the test above would not see whether stages quantise."""
    whole = cases["xcomposer2"].expected
    assert all(cases[layout].expected != whole for layout in LAYOUTS)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_each_process_reads_its_own_weights_alone(
    cases: dict[str, Case], outcomes: Outcomes, name: str, num_stages: int
) -> None:
    read_bytes = outcomes[name, num_stages]["read_bytes"].values()
    stored_bytes = sum(path.stat().st_size for path in cases[name].folder.glob("*.safetensors"))
    assert len(read_bytes) == num_stages
    assert max(read_bytes) < 0.95 * stored_bytes
    # A tied head is read where the embedding is, and where it runs.
    assert sum(read_bytes) <= (1.5 if name == "gemma3" else 1.0) * stored_bytes


def test_sampling_depends_on_the_seed_and_not_on_stages_or_groups(outcomes: Outcomes) -> None:
    seven = outcomes["seed 7", 2]["answers"]
    assert seven == outcomes["seed 7, one group", 2]["answers"] == outcomes["seed 7", 3]["answers"]
    assert seven != outcomes["seed 8", 2]["answers"]
    assert seven != outcomes["xcomposer2", 2]["answers"]


def test_the_example_answers_all_its_questions(outcomes: Outcomes) -> None:
    printed = outcomes.out.splitlines()
    numbers = [int(line.split()[0]) for line in printed if line[0].isdigit()]
    assert sorted(numbers) == list(range(12))
    assert any(line.startswith("stage 1  ") for line in printed)


def test_another_checkpoint_in_one_process_is_found_before_weights_are_read(outcomes: Outcomes) -> None:
    refusal = outcomes["other checkpoint", 2]["refusal"]
    assert "the processes have different checkpoint: rank 0, stage 0 on cuda:0" in refusal
    assert "Every process needs the same plan, checkpoint and versions" in refusal
    assert messages(outcomes.err)[0] == f"plan-devices: {refusal}."


def test_a_full_device_ends_all(outcomes: Outcomes) -> None:
    """The last stage's virtual GPU holds its weights, and nothing beside them."""
    _, message = messages(outcomes.err)
    assert outcomes.code == 1
    assert "rank 1, stage 1 on cuda:1" in message
    assert "out of memory while preparing the prompts of requests 0, 1" in message
    assert "vgpu:0 has a total capacity" in message
