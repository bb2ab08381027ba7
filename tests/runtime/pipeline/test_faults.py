"""Whatever happens to one process ends the job everywhere within 30 s, with one message; what was finished is kept."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planner import Machine, Plan, PlanMismatchError, Workload
from planner.memory import MemoryBreakdown
from runtime.pipeline.agreement import Terms, refuse_disagreement
from runtime.pipeline.launched import Launched
from runtime.pipeline.places import own_stage
from runtime.pipeline.watch import Member
from tests.runtime.pipeline.jobs import WORKER, Job, torchrun, wait_for_lines
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint
from vlm.model import find_model
from vlm.planning import plan_for

NUM_QUESTIONS = 60
WORKLOAD = Workload(dtype="float32", batch_size=2, num_images=1, prompt_tokens=64, new_tokens=16)
ENDS_WITHIN_S = 30


@pytest.fixture(scope="module")
def plan(tiny_xcomposer2: Path) -> Plan:
    return plan_for(find_model(str(tiny_xcomposer2)), Machine.parse("2x2GiB"), WORKLOAD)


def launched(folder: Path, checkpoint: Path, plan: Plan) -> Job:
    """A job that answers many questions, one after the other."""
    folder.mkdir(exist_ok=True)
    plan.save(folder / "plan.yaml")
    lines = [json.dumps({"prompt": f"question number {index}"}) for index in range(NUM_QUESTIONS)]
    (folder / "q.jsonl").write_text("\n".join(lines))
    options = ("--devices", "cpu", "--max-new-tokens", "8", "--groups", "2", "--group-size", "1")
    files = ("--input", "q.jsonl", "--output", "a.jsonl")
    return Job.start("-m", "planner", "launch", "plan.yaml", checkpoint, *files, *options, cwd=folder)


def messages(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("plan-devices:")]


FAULTS: Mapping[str, tuple[int, int, str]] = {
    "first-killed": (0, signal.SIGKILL, r"its process died"),
    "last-killed": (1, signal.SIGKILL, r"its process died"),
    "first-stopped": (0, signal.SIGSTOP, r"it hangs: no sign of life for 1\d s"),
    "last-stopped": (1, signal.SIGSTOP, r"it hangs: no sign of life for 1\d s"),
}


def test_a_process_that_dies_or_hangs_ends_all_and_the_rest_is_answered_later(
    tiny_xcomposer2: Path, plan: Plan, tmp_path: Path
) -> None:
    jobs = {name: launched(tmp_path / name, tiny_xcomposer2, plan) for name in FAULTS}
    try:
        struck = strike(jobs, tmp_path)
        for name, (since, ranks) in struck.items():
            expect_the_end(name, jobs[name], since, ranks)
            assert 3 <= len((tmp_path / name / "a.jsonl").read_text().splitlines()) < NUM_QUESTIONS
    finally:
        for job in jobs.values():
            job.kill()
    kept = answered(tmp_path / "last-killed")
    code, _, err = launched(tmp_path / "last-killed", tiny_xcomposer2, plan).ended()
    after = answered(tmp_path / "last-killed")
    assert code == 0, err
    assert [line["index"] for line in after] == list(range(NUM_QUESTIONS))
    assert all(after[line["index"]] == line for line in kept)


def strike(jobs: Mapping[str, Job], folder: Path) -> dict[str, tuple[float, dict[int, int]]]:
    """Let each fault happen once answers come; when that was, and the processes by rank."""
    struck = {}
    for name, (rank, number, _) in FAULTS.items():
        wait_for_lines(folder / name / "a.jsonl", 3, jobs[name])
        ranks = jobs[name].ranks()
        os.kill(ranks[rank], number)
        struck[name] = time.monotonic(), ranks
    return struck


def expect_the_end(name: str, job: Job, since: float, ranks: Mapping[int, int]) -> None:
    """The job ends in time everywhere, with one message that names the process and the cause."""
    rank, _, cause = FAULTS[name]
    code, _, err = job.ended(timeout_s=60)
    assert time.monotonic() - since < ENDS_WITHIN_S, name
    assert code == 1, err
    (message,) = messages(err)
    assert message.startswith(f"plan-devices: rank {rank}, stage {rank} on cuda:{rank}, process {ranks[rank]} of ")
    assert re.search(cause, message), message
    assert [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()] == []


def answered(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def case(folder: Path, checkpoint: Path, plan: Plan, **more: Any) -> Path:
    """A job file with one case of one question."""
    plan.save(folder / "plan.yaml")
    inputs = dict(XComposer2Processor.from_folder(checkpoint)(["question " * 40], [[]]))
    torch.save([inputs] * 2, folder / "inputs.pt")
    listed = {
        "folder": str(checkpoint),
        "plan": str(folder / "plan.yaml"),
        "inputs": str(folder / "inputs.pt"),
        "options": {"max_new_tokens": 4, "do_sample": False},
        "out": str(folder / "out.json"),
        **more,
    }
    (folder / "job.json").write_text(json.dumps([listed]))
    return folder / "job.json"


def test_a_full_device_ends_all(tiny_xcomposer2: Path, plan: Plan, tmp_path: Path) -> None:
    """The last stage's virtual GPU holds its weights, and nothing beside them."""
    devices = list(plan.machine.devices)
    own = devices[1].context_bytes + devices[1].reserve_bytes
    weights = plan.memory[1].weights_bytes
    devices[1] = replace(devices[1], memory_bytes=own + weights + 2**16)
    blind = replace(
        plan,
        machine=replace(plan.machine, devices=tuple(devices)),
        memory=dict.fromkeys(plan.memory, MemoryBreakdown(weights_bytes=weights)),
    )
    code, _, err = torchrun(2, WORKER, case(tmp_path, tiny_xcomposer2, blind, devices="virtual")).ended()
    (message,) = messages(err)
    assert code == 1
    assert "rank 1, stage 1 on cuda:1" in message
    assert "out of memory while running the prompts of requests 0" in message
    assert "vgpu:0 has a total capacity" in message


def test_another_checkpoint_in_one_process_is_found_before_weights_are_read(
    tiny_xcomposer2: Path, plan: Plan, tmp_path: Path
) -> None:
    sizes = {"num_layers": 6, "hidden_size": 32, "intermediate_size": 96, "vision_layers": 2}
    other = write_random_checkpoint(tmp_path / "other", dtype="float32", max_shard_bytes=2**17, seed=5, **sizes)
    job = case(tmp_path, tiny_xcomposer2, plan, folders=[str(tiny_xcomposer2), str(other)])
    code, _, err = torchrun(2, WORKER, job).ended()
    (message,) = messages(err)
    assert code == 1
    assert "the processes have different checkpoint: rank 0, stage 0 on cuda:0" in message
    assert "Every process needs the same plan, checkpoint and versions" in message


MEMBERS = [
    Member(rank=rank, stage=rank, device=f"cuda:{rank}", host="here", agent=0, pid=100 + rank) for rank in range(2)
]
SAME = Terms(plan="p", checkpoint="c", versions="torch 2")


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (replace(SAME, plan="q"), "different plan: rank 0.* has p, rank 1.* has q"),
        (replace(SAME, versions="torch 3"), "different versions: .* has torch 2, .* has torch 3"),
        (replace(SAME, problem="there is no folder /models"), "not every process can take part. rank 1.*no folder"),
    ],
)
def test_processes_with_other_terms_are_told_apart(other: Terms, text: str) -> None:
    refuse_disagreement([SAME, SAME], MEMBERS)
    with pytest.raises(PlanMismatchError, match=text):
        refuse_disagreement([SAME, other], MEMBERS)


def test_more_processes_than_stages_are_refused_and_one_says_so(plan: Plan) -> None:
    def refusal(rank: int) -> PlanMismatchError:
        one = Launched(rank=rank, world_size=3, local_rank=rank, agent=0, address="127.0.0.1")
        with pytest.raises(
            PlanMismatchError, match="the plan has 2 stages, on 0, 1, and torchrun has started 3"
        ) as found:
            own_stage(plan, one, None)
        return found.value

    assert [refusal(rank).is_reported for rank in range(3)] == [False, True, True]
