"""The README's first screen is what the command prints today."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = "    $ plan-devices internlm-xcomposer2-vl-7b --gpus 24GiB,12GiB -o plan.yaml\n"


def test_the_first_screen_is_what_the_command_prints(tmp_path: Path) -> None:
    arguments = COMMAND.split()[2:]
    done = subprocess.run(
        [sys.executable, "-m", "planner", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
    )
    printed = "".join(f"    {line}".rstrip() + "\n" for line in done.stderr.splitlines())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert COMMAND + printed in readme


def test_every_file_of_the_three_packages_is_in_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in ("planner", "vlm", "runtime"):
        for path in (ROOT / package).glob("*.py"):
            assert path.name == "__init__.py" or path.name in readme or path.name == "__main__.py", path


def test_the_sweeps_count_is_the_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    clean, total = re.findall(r"\*\*(\d+) of (\d+)\*\*", (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8"))[0]
    assert f"{clean} of the {total} image-text-to-text" in " ".join(readme.split())


def test_the_count_of_models_is_the_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    count = re.findall(r"^(\d+) models", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert f"{count} models are known by name" in " ".join(readme.split())


def test_what_is_said_of_pictures_is_what_transformers_tables_say() -> None:
    command = [sys.executable, "-c", "from benchmarks.pictures import page; print(page(), end='')"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    written = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    if version("transformers") == "5.23.0":
        assert done.stdout == written
    counts = re.findall(r"\((\d+)\):\*", written)
    assert f"{int(counts[0]) + int(counts[1])} of the {sum(map(int, counts))} model types" in " ".join(
        (ROOT / "README.md").read_text(encoding="utf-8").split()
    )
