"""`plan-devices check` as a user types it, on a tiny checkpoint: reports, files, exit codes, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from planner.cli.main import main
from runtime import load_sharded

ROOT = Path(__file__).parents[2]
GPUS = ("--gpus", "2x2GiB")
GOOD = {
    **{"vit": 0, "vision_proj": 0, "model.tok_embeddings": 0},
    **{f"model.layers.{i}": i // 3 for i in range(6)},
    **{"model.norm": 1, "output": 1},
}


@pytest.fixture
def bad_map(tmp_path: Path) -> Path:
    """The projector away from the token embedding: text and image cannot be joined."""
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**GOOD, "vision_proj": 1}))
    return path


def check(*arguments: str | Path) -> int:
    return main(["check", *map(str, arguments)])


def test_an_unsafe_map_is_explained_on_stdout_with_exit_code_1(
    tiny_xcomposer2: Path, bad_map: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tiny_xcomposer2, bad_map, *GPUS) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "1 will fail" in text
    assert "cat: operands on cuda:1 and cuda:0 [merge]" in text
    assert "vlm/image_positions.py:" in text
    assert "Smallest repair: move vision_proj.2" in text
    assert "room for KV positions per sequence" in text


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_fix_writes_a_map_that_is_clean_and_loads(
    suffix: str, tiny_xcomposer2: Path, bad_map: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = tmp_path / f"fixed{suffix}"
    assert check(tiny_xcomposer2, bad_map, *GPUS, "--fix", "-o", fixed) == 1
    assert f"Repaired map written to {fixed}" in capsys.readouterr().err
    assert (json.loads if suffix == ".json" else yaml.safe_load)(fixed.read_text())["vision_proj.2"] == 0
    assert check(tiny_xcomposer2, fixed, *GPUS) == 0


def test_a_plan_of_ours_is_clean_as_json_and_on_a_page(
    tiny_xcomposer2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, page, plan_page = tmp_path / "plan.yaml", tmp_path / "check.html", tmp_path / "plan.html"
    assert main([str(tiny_xcomposer2), *GPUS, "-o", str(plan), "--report", str(plan_page)]) == 0
    capsys.readouterr()
    assert check(tiny_xcomposer2, plan, *GPUS, "--json", "--report", page) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["verdict"] == "clean"
    assert content["runs"] == ["prefill", "2 decode steps", "generate()"]
    assert content["repair"] is None
    assert all("<svg" in path.read_text() and "</html>" in path.read_text() for path in (page, plan_page))
    assert load_sharded(tiny_xcomposer2, plan, devices="virtual") is not None


def test_a_strategy_of_transformers_is_checked_by_name_and_told_in_markdown(
    tiny_xcomposer2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = check(tiny_xcomposer2, "balanced-low-0", *GPUS, "--markdown")
    text = capsys.readouterr().out
    assert text.startswith(f"### `{tiny_xcomposer2.name}` with `balanced_low_0`: ")
    assert code == ("will fail" in text)


def test_risks_in_the_folders_own_code_and_in_a_script_are_told(
    tiny_xcomposer2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, script = tmp_path / "good.json", tmp_path / "chat.py"
    good.write_text(json.dumps(GOOD))
    script.write_text("inputs = processor(text).to('cuda')\nmodel.language_model.generate(**inputs)\n")
    assert check(tiny_xcomposer2, good, *GPUS, "--source", script, "--json") == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [(finding["severity"], finding["hazard"]) for finding in findings] == [
        ("may fail", "hardcuda"),
        ("may fail", "genio"),
    ]
    assert findings[0]["place"] == "chat.py:1: processor(text).to('cuda')"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "holds list, not a mapping"),
        ('{"vit": "gpu"}', "says 'vit': 'gpu'. A device is a GPU's index"),
        ('{"vit": 7}', "says vit: 7; this machine has the GPUs 0, 1"),
        ('{"vit": 0, "vit": 1}', "'vit' is given twice"),
        ("a: &x 0\nb: *x", "alias"),
    ],
)
def test_what_is_no_map_is_one_line_with_exit_code_3(
    content: str, reason: str, tiny_xcomposer2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "map.yaml"
    path.write_text(content)
    assert check(tiny_xcomposer2, path, *GPUS) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in captured.err
    assert captured.err.count("\n") == 1


def test_a_missing_map_and_a_fix_without_a_file_are_refused(
    tiny_xcomposer2: Path, bad_map: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tiny_xcomposer2, "none.json", *GPUS) == 3
    assert "there is no file none.json: name a JSON or YAML file, a plan of ours, or auto" in capsys.readouterr().err
    assert check(tiny_xcomposer2, "x" * 5000, *GPUS) == 3
    assert check(tiny_xcomposer2, bad_map, *GPUS, "--source", "x" * 5000) == 3
    assert "cannot be read: File name too long" in capsys.readouterr().err
    assert check(tiny_xcomposer2, bad_map, *GPUS, "--fix") == 2
    assert "name it with -o FILE" in capsys.readouterr().err
    assert check(tiny_xcomposer2, bad_map, *GPUS, "--fix", "-o", bad_map) == 2
    assert "exists: choose another file" in capsys.readouterr().err


def test_files_that_would_not_be_written_or_overwrite_each_other_are_refused(
    tiny_xcomposer2: Path, bad_map: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert check(tiny_xcomposer2, bad_map, *GPUS, "-o", page) == 2
    assert "add --fix" in capsys.readouterr().err
    assert check(tiny_xcomposer2, bad_map, *GPUS, "--fix", "-o", page, "--report", page) == 2
    assert "one would overwrite the other" in capsys.readouterr().err
    assert not page.exists()


def test_code_of_the_folder_that_cannot_be_read_is_noted_and_the_users_is_refused(
    tiny_xcomposer2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, script, good = tmp_path / "folder", tmp_path / "chat.py", tmp_path / "good.json"
    shutil.copytree(tiny_xcomposer2, folder)
    good.write_text(json.dumps(GOOD))
    for path in (folder / "modeling.py", script):
        path.write_text("def f(:\n")
    assert check(folder, good, *GPUS, "--fix", "-o", tmp_path / "fixed.json") == 0
    captured = capsys.readouterr()
    assert "The folder's own code was not looked through: source modeling.py is not Python" in captured.out
    assert "Nothing to repair: the map as given written to" in captured.err
    assert check(folder, good, *GPUS, "--source", script) == 3
    assert "source chat.py is not Python: invalid syntax (chat.py, line 1)" in capsys.readouterr().err


def test_a_launchers_variables_are_read_from_the_environment(tiny_xcomposer2: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps(GOOD))
    command = [sys.executable, "-m", "planner", "check", str(tiny_xcomposer2), str(good), *GPUS, "--json"]
    environment = {**os.environ, "WORLD_SIZE": "4", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["findings"][0]["hazard"] == "launcher"
