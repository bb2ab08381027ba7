"""Every example runs, as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from planner import Machine

EXAMPLES = Path(__file__).parents[1] / "examples"
NEED_ARGUMENTS = {"generate_from_picture.py", "answer_in_a_pipeline.py"}


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.py") if p.name not in NEED_ARGUMENTS))
def test_example_runs(script: str) -> None:
    assert run(script)


def test_a_picture_is_answered_from_a_folder(tiny_xcomposer2: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "green").save(tmp_path / "green.png")
    assert run("generate_from_picture.py", tiny_xcomposer2, tmp_path / "green.png", "What is this?", "2x2GiB").strip()


@pytest.mark.parametrize("path", sorted((EXAMPLES / "machines").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_machine_is_read(path: Path) -> None:
    assert len(Machine.load(path).devices) > 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 50
