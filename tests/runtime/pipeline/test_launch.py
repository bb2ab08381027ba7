"""The command: questions in a file, answers in another, by processes of one host or of two; as one process answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from planner import Machine, MachineError, Plan, Workload
from planner.cli import main as command
from runtime import load_sharded
from runtime.pipeline.launcher import host_commands, program_of
from tests.runtime.pipeline.jobs import ROOT, Job, free_port
from vlm.model import find_model
from vlm.planning import plan_for

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "What is in the garden?", "images": ["a.png"]},
    {"id": 7, "prompt": "<ImageHere>and<ImageHere>The lighthouse", "images": ["a.png", "a.png"]},
    {"prompt": "Three red apples"},
    {"prompt": "No such picture", "images": ["missing.png"]},
    {"prompt": "Who holds the umbrella under the old bridge, and why?", "images": ["a.png"]},
]
WORKLOAD = Workload(dtype="float32", batch_size=2, num_images=2, prompt_tokens=64, new_tokens=16)
FILES = ("--input", "q.jsonl", "--output", "a.jsonl")
OPTIONS = ("--devices", "cpu", "--max-new-tokens", "6")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the questions and their picture are."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    Image.linear_gradient("L").resize((60, 40)).convert("RGB").save(tmp_path / "a.png")
    return tmp_path


def planned(checkpoint: Path, spec: str) -> Plan:
    return plan_for(find_model(str(checkpoint)), Machine.parse(spec), WORKLOAD)


def answers_of_one_process(checkpoint: Path, folder: Path) -> list[dict[str, Any]]:
    planned(checkpoint, "8GiB").save(folder / "one.yaml")
    arguments = ["run", str(checkpoint), "--plan", str(folder / "one.yaml"), *OPTIONS, "--quiet"]
    files = ["--input", str(folder / "q.jsonl"), "--output", str(folder / "one.jsonl")]
    assert command.main([*arguments, *files]) == 3
    return lines(folder / "one.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    """The answers in a file; of a failed one only that it failed, as the reason has a path in it."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{**line, "error": "cannot be opened" in line["error"]} if "error" in line else line for line in found]


def test_a_file_of_questions_is_answered_as_by_one_process(tiny_xcomposer2: Path, folder: Path) -> None:
    planned(tiny_xcomposer2, "2x2GiB").save(folder / "plan.yaml")
    job = Job.start("-m", "planner", "launch", "plan.yaml", tiny_xcomposer2, *FILES, *OPTIONS, "--chart", cwd=folder)
    code, out, err = job.ended()
    assert (code, out) == (3, ""), err
    assert lines(folder / "a.jsonl") == answers_of_one_process(tiny_xcomposer2, folder)
    assert lines(folder / "a.jsonl")[3]["error"] is True
    assert "stage 0  #" in err
    assert "1 questions failed: their lines say why" in err
    assert command.main(["launch", str(folder / "plan.yaml"), str(tiny_xcomposer2), *absolute(folder), *OPTIONS]) == 0


def absolute(folder: Path) -> list[str]:
    return ["--input", str(folder / "q.jsonl"), "--output", str(folder / "a.jsonl")]


def test_two_agents_run_one_plan_over_two_hosts(tiny_xcomposer2: Path, folder: Path) -> None:
    planned(tiny_xcomposer2, "b=2GiB/a=2x2GiB").save(folder / "plan.yaml")
    meeting = ("--rendezvous", f"127.0.0.1:{free_port()}")
    rest = ("plan.yaml", tiny_xcomposer2, *FILES, *OPTIONS, "--quiet")
    jobs = [Job.start("-m", "planner", "launch", "--host", host, *meeting, *rest, cwd=folder) for host in ("a", "b")]
    found = [job.ended() for job in jobs]
    assert [code for code, _, _ in found] == [3, 3], found
    assert lines(folder / "a.jsonl") == answers_of_one_process(tiny_xcomposer2, folder)


def test_commands_for_several_hosts_are_printed(
    tiny_xcomposer2: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(tiny_xcomposer2, "a=2GiB/b=2x2GiB")
    plan.save(folder / "plan.yaml")
    arguments = ["launch", str(folder / "plan.yaml"), str(tiny_xcomposer2), *absolute(folder)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    program = program_of(arguments[2:], folder / "plan.yaml")
    first, second = host_commands(plan, program, None).values()
    assert printed == ["# on a", first, "# on b", second]
    assert first.startswith("torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d")
    assert "--rdzv-endpoint a:29400 --max-restarts 0 --shutdown-timeout 5 -m planner run" in first
    assert second.endswith("--host b")
    assert "--nproc-per-node 2" in second


def test_a_script_with_a_pipeline_runs_as_the_example_does(tiny_xcomposer2: Path, folder: Path) -> None:
    planned(tiny_xcomposer2, "2x2GiB").save(folder / "plan.yaml")
    example = ROOT / "examples" / "answer_in_a_pipeline.py"
    arguments = ("plan.yaml", example, "plan.yaml", tiny_xcomposer2, "virtual")
    code, out, err = Job.start("-m", "planner", "launch", *arguments, cwd=folder).ended()
    assert code == 0, err
    numbers = [int(line.split()[0]) for line in out.splitlines() if line[0].isdigit()]
    assert sorted(numbers) == list(range(12))
    assert "stage 1  " in out


def test_a_script_is_run_as_it_is(tmp_path: Path) -> None:
    assert program_of(["mine.py", "--fast"], tmp_path / "plan.yaml") == ["mine.py", "--fast"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "launch what? MODEL --input FILE.jsonl"),
        (["MODEL", "--input", "q.jsonl"], 2, "--input needs --output"),
        (["MODEL", "--prompt", "hello"], 2, "--pipeline answers many questions"),
        (
            ["MODEL", "--input", "q.jsonl", "--output", "a.jsonl", "--group-size", "3"],
            *(2, "--group-size 3: the plan is for 2 at once. Plan again with --batch-size 3"),
        ),
    ],
)
def test_wrong_arguments_start_no_process(
    tiny_xcomposer2: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    text: str,
) -> None:
    planned(tiny_xcomposer2, "2x2GiB").save(tmp_path / "plan.yaml")
    assert command.main(["launch", str(tmp_path / "plan.yaml"), *arguments]) == code
    assert text in capsys.readouterr().err


def test_a_plan_over_several_hosts_points_to_launch(tiny_xcomposer2: Path) -> None:
    plan = planned(tiny_xcomposer2, "a=2GiB/b=2GiB")
    with pytest.raises(MachineError, match="spans hosts a, b: .* plan-devices launch PLAN"):
        load_sharded(tiny_xcomposer2, plan, devices="cpu")
