"""Objectives from the command line: what each is for, what the others would give, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from planner.alternatives import alternatives
from planner.constraints import Constraints
from planner.machine import Machine
from planner.plan import Plan
from planner.problem import evaluate
from planner.report import seconds_text
from planner.solve import chain_dp
from planner.workload import Workload
from vlm.model import find_model
from vlm.planning import plan_for, problem_for

ROOT = Path(__file__).parents[2]
MODEL = "internlm-xcomposer2-vl-7b"
COMPOSER = find_model(MODEL)


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "planner", MODEL, *arguments]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize("spec", ["rtx4090,l4", "2xrtx3090,2xt4", "a100-40g"])
def test_each_alternative_is_the_best_of_the_three_in_what_it_is_for(spec: str) -> None:
    problem = problem_for(COMPOSER, Machine.parse(spec), Workload(), Constraints())
    found = {one.objective: one for one in alternatives(problem)}
    assert list(found) == ["fewest", "latency", "balance"]
    assert found["fewest"].num_devices == min(one.num_devices for one in found.values())
    totals = {key: (one.estimate.ttft_s or 0) + 512 * (one.estimate.tpot_s or 0) for key, one in found.items()}
    assert totals["latency"] == min(totals.values()) > 0
    assert found["balance"].num_devices == max(one.num_devices for one in found.values())


def test_without_speeds_there_is_no_fastest_alternative_and_no_time() -> None:
    problem = problem_for(COMPOSER, Machine.parse("2x24GiB"), Workload(), Constraints())
    found = {one.objective: one.estimate for one in alternatives(problem)}
    assert set(found) == {"fewest", "balance"}
    assert {(one.ttft_s, one.tpot_s, one.tokens_per_s) for one in found.values()} == {(None, None, None)}


def test_the_estimate_is_what_the_evaluator_gives_for_the_plans_stages() -> None:
    machine = Machine.parse("rtx4090,l4")
    plan = plan_for(COMPOSER, machine, objective="throughput")
    problem = replace(problem_for(COMPOSER, machine, Workload(), Constraints()), objective="throughput")
    times = evaluate(problem, chain_dp.solve(problem).stages).times
    assert times is not None and plan.solver.value == plan.solver.bound == times.bottleneck_ns
    assert plan.estimate.ttft_s == times.total.first_ns / 1e9
    assert plan.estimate.tpot_s == times.total.token_ns / 1e9
    assert plan.estimate.tokens_per_s == pytest.approx(1e9 / times.total.token_ns, abs=1e-3)
    assert Plan.from_yaml(plan.to_yaml()) == plan


def test_a_batch_makes_more_tokens_in_a_step_that_takes_longer() -> None:
    one, four = (plan_for(COMPOSER, Machine.parse("a100-80g"), Workload(batch_size=n)).estimate for n in (1, 4))
    assert one.tpot_s and four.tpot_s and one.tokens_per_s and four.tokens_per_s
    assert one.tpot_s < four.tpot_s < 4 * one.tpot_s
    assert one.tokens_per_s < four.tokens_per_s < 4 * one.tokens_per_s


def test_a_longer_answer_costs_more_per_token_because_its_cache_is_longer() -> None:
    short, long = (plan_for(COMPOSER, Machine.parse("a100-80g"), Workload(new_tokens=n)).estimate for n in (8, 8192))
    assert short.ttft_s == long.ttft_s
    assert short.tpot_s and long.tpot_s and short.tpot_s < long.tpot_s


def test_the_three_alternatives_stand_side_by_side_and_the_plans_own_is_marked() -> None:
    lines = run("--gpus", "rtx4090,l4", "--objective", "latency").stderr.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Alternatives"))
    assert lines[start].split() == ["Alternatives", "GPUs", "KV", "positions", "TTFT", "TPOT"]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[start + 1 : start + 4]] == [
        "fewest GPUs",
        "lowest latency (this)",
        "balance",
    ]
    assert any(line.startswith("Estimated: first token after ") for line in lines)


def test_the_objective_decides_the_plan() -> None:
    plans = {
        objective: Plan.from_yaml(run("--gpus", "rtx4090,l4", "--objective", objective, "--quiet").stdout)
        for objective in ("balance", "latency", "throughput", "fewest")
    }
    assert {name: plan.solver.objective for name, plan in plans.items()} == {name: name for name in plans}
    assert {name: len(plan.stages) for name, plan in plans.items()} == {
        "balance": 2,
        "latency": 1,
        "throughput": 2,
        "fewest": 1,
    }


def test_devices_restricts_and_all_devices_forces() -> None:
    only = Plan.from_yaml(run("--gpus", "rtx4090,l4,t4", "--devices", "0,2", "--quiet").stdout)
    assert [device.index for device in only.machine.devices] == [0, 2] and set(only.placement.values()) == {0, 2}
    options = ("--gpus", "rtx4090,l4", "--objective", "latency", "--all-devices", "--quiet")
    assert len(Plan.from_yaml(run(*options).stdout).stages) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--gpus", "2x24GiB", "--objective", "latency"), 2, "the objective latency needs the speed of cuda:0, cuda:1"),
        (("--gpus", "2x24GiB", "--devices", "0,5"), 2, "there is no device 5: this machine has 0, 1"),
        (("--gpus", "2x24GiB", "--devices", "0,"), 2, "'0,' has an empty item: write devices such as 0,2"),
        (("--gpus", "2x24GiB", "--time-limit", "-1"), 2, "'-1' is no time to wait"),
        (("--gpus", "2x24GiB", "--objective", "fast"), 2, "invalid choice: 'fast'"),
        (("--gpus", "24GiB,1GiB", "--all-devices"), 1, "does not fit"),
    ],
    ids=["no speed", "no such device", "an empty item", "a negative time", "an unknown objective", "a tiny device"],
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], code: int, message: str) -> None:
    assert message in " ".join(run(*arguments, code=code).stderr.split())


def test_a_plan_of_the_catalogue_does_not_import_ortools() -> None:
    script = (
        "import sys; from planner.cli.main import main; code = main(sys.argv[1:]); "
        "print([m for m in ('ortools', 'torch', 'pandas') if m in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, MODEL, "--gpus", "rtx4090,l4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


def test_the_machine_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    command = [sys.executable, "-m", "planner", "machine", "--gpus", "rtx4090,l4", "--save", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "") and Machine.load(path) == Machine.parse("rtx4090,l4")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2 and "exists: choose another file" in again.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (1.25, "1.25 s"), (0.0125, "12.5 ms"), (0.0999, "99.9 ms"), (0.1, "0.10 s")]
)
def test_seconds_are_written_for_people(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text
