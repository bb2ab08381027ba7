"""Writes the golden files anew: `PYTHONPATH=. python tests/planner/golden/update.py`, then read the diff."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from planner.machine import Machine
from planner.plan import Plan
from planner.report import report
from vlm.model import find_model
from vlm.planning import plan_for

FOLDER = Path(__file__).parent
MODEL = "internlm-xcomposer2-vl-7b"
MACHINES = {"2x24": "2x24GiB", "24-12-8": "24GiB,12GiB,8GiB", "a100-40g": "a100-40g"}


def text_of(plan: Plan) -> str:
    """The report as a terminal of 100 columns without colour shows it, without the blanks at line ends."""
    stream = io.StringIO()
    Console(file=stream, width=100, no_color=True, highlight=False).print(report(plan))
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


def rendered() -> dict[str, str]:
    """File name to text, for every golden file."""
    plans = {name: plan_for(find_model(MODEL), Machine.parse(spec)) for name, spec in MACHINES.items()}
    reports = {f"{name}.txt": text_of(plan) for name, plan in plans.items()}
    return {**reports, **{f"{name}.yaml": plan.to_yaml() for name, plan in plans.items()}}


if __name__ == "__main__":
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
