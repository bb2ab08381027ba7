"""Costs on file: fresh traces of a few models agree with them, and the table is of their versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vlm.catalogue import catalogue_names
from vlm.cost_library import read_shipped
from vlm.model import find_model
from vlm.traced import TracedModel

ROOT = Path(__file__).parents[2]
FEW = ("llava-1.5-7b-hf", "qwen3-vl-8b-instruct")


def test_costs_on_file_are_met_by_fresh_traces_and_never_below_them() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "trace_catalogue.py"), "--check", *FEW]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [done.stdout.count(f"| {name} |") for name in FEW] == [4, 4]


def test_the_table_has_every_model_and_kind_of_workload_in_the_versions_on_file() -> None:
    table = (ROOT / "docs" / "costs.md").read_text(encoding="utf-8")
    traced = [model for name in catalogue_names() if isinstance(model := find_model(name), TracedModel)]
    for model in traced:
        for kind, costs in read_shipped(model.catalogue_stem or "").items():
            assert f"| {model.catalogue_stem} | {kind} |" in table
            assert costs.versions in table
    assert len(traced) >= 15
