"""A fixed part of the sweep over model types in full, and that its table is of the installed versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import accelerate
import torch
import transformers

ROOT = Path(__file__).parents[2]
SUBSET = (
    "llava llava_onevision qwen2_vl qwen2_5_vl qwen3_vl paligemma gemma3 mllama idefics3 smolvlm internvl glm4v "
    "florence2 blip aria"
).split()


def test_fifteen_types_are_planned_and_run_clean_on_two_three_and_four_devices() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "sweep.py"), *SUBSET]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" clean\n") == len(SUBSET) == 15


def test_the_table_in_docs_is_of_the_installed_versions() -> None:
    table = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, accelerate"
    if (transformers.__version__, torch.__version__.partition("+")[0]) == ("5.23.0", "2.13.0"):
        assert f"{versions} {accelerate.__version__}" in table
    assert all(f"| {model_type} |" in table for model_type in SUBSET)
