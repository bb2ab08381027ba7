"""`--maximize` and `--recommend` on the command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from planner import Plan
from planner.cli.main import main


def test_maximize_plans_for_the_largest_batch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    arguments = "internlm-xcomposer2-vl-7b --gpus 24GiB,12GiB --no-proof --maximize batch -o".split()
    assert main([*arguments, str(file)]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    batch = Plan.load(file).workload.batch_size
    assert batch > 1
    assert f"Largest batch: {batch} sequences; with {batch + 1}, cuda:" in printed


def test_maximize_context_says_how_much_of_it_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("llava-1.5-7b-hf --gpus 80GiB --no-proof --maximize context".split()) == 0
    captured = capsys.readouterr()
    assert "Largest context: 4,096 positions, of which 3,008 are text" in captured.err
    assert "max_model_len: 4096" in captured.out


def test_maximize_contradicts_a_given_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("llava-1.5-7b-hf --gpus 80GiB --maximize context --max-model-len 4000".split()) == 2
    assert "--maximize context finds --max-model-len: give one of the two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("of", "given"), [("context", "--prompt-tokens"), ("batch", "--batch-size"), ("images", "--num-images")]
)
def test_maximize_finds_what_is_then_not_given(of: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"llava-1.5-7b-hf --gpus 80GiB --maximize {of} {given} 4".split()) == 2
    assert f"--maximize {of} finds {given}: give one of the two" in capsys.readouterr().err


def test_maximize_counts_on_the_gpus_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("llava-1.5-7b-hf --gpus 80GiB --maximize batch --offload --host-memory 64GiB".split()) == 2
    assert "--maximize looks for what fits on the GPUs: leave out --offload" in capsys.readouterr().err


def test_recommend_lists_machines_with_commands_that_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("internlm2-20b --recommend --json --batch-size 2".split()) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["command"].startswith("plan-devices internlm2-20b --batch-size 2 --gpus ")
    assert main([*shlex.split(rows[0]["command"])[1:], "--no-proof", "--json", "--quiet"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["capacity"]["kv_tokens"] == rows[0]["kv_tokens"]
    assert plan["estimate"]["tpot_s"] == rows[0]["tpot_s"]


def test_recommend_prints_a_table_and_how_it_is_ordered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["internlm2-7b", "--recommend"]) == 0
    printed = capsys.readouterr().out
    assert "prices are not known here" in " ".join(printed.split())
    assert printed.splitlines()[1].split() == ["with", "GiB", "in", "all", "KV", "positions", "TTFT", "TPOT"]


def test_recommend_into_a_file(tmp_path: Path) -> None:
    assert main(["internlm2-7b", "--recommend", "-o", str(tmp_path / "cards.txt")]) == 0
    assert "--gpus l4" in (tmp_path / "cards.txt").read_text(encoding="utf-8")


def test_recommend_takes_no_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("internlm2-7b --recommend --gpus l4".split()) == 2
    assert "--recommend looks for machines: leave out --gpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--offload", "looks for what fits on the GPUs: leave out --offload"),
        ("--report page.html", "makes no plan: give --report with a command that it prints"),
        ("--save-graph graph.json", "makes no plan: give --save-graph with a command that it prints"),
        ("--format device-map", "prints a table, or JSON: --format device-map is for a plan"),
    ],
)
def test_recommend_does_nothing_that_needs_one_plan(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["internlm2-7b", "--recommend", *given.split()]) == 2
    assert f"--recommend {said}" in capsys.readouterr().err


def test_recommend_names_the_precision_that_auto_comes_to_on_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("internlm2-20b --recommend --quantize auto --json".split()) == 0
    rows = {row["options"][1]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["t4"]["options"][2:] == ["--quantize", "nf4"]
    assert rows["h200"]["command"] == "plan-devices internlm2-20b --gpus h200"
    several = next(row for row in rows.values() if row["num_cards"] > 1)
    assert main([*several["command"].split()[1:], "--json", "--no-proof", "--quiet"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["capacity"]["kv_tokens"] == several["kv_tokens"]
    assert plan["estimate"]["tpot_s"] == several["tpot_s"]


def test_recommend_says_when_nothing_known_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("qwen2.5-vl-72b-instruct --recommend --batch-size 5000".split()) == 1
    assert "No machine of up to 8 equal cards" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["--recommend", "--maximize batch"])
def test_a_module_graph_file_has_no_other_sizes(asked: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    file.write_text("{}", encoding="utf-8")
    assert main([str(file), *asked.split()]) == 2
    assert f"{asked}: a module-graph file has one workload" in capsys.readouterr().err
