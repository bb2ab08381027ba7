"""Writes the plans of the named models anew: `PYTHONPATH=. python tests/vlm/golden_plans/update.py`; read the diff.

For each case: a model's plan on the smallest of some equal machines that holds the workload, and on one A100 40G.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from planner.constraints import Constraints
from planner.errors import InfeasibleError
from planner.machine import Machine
from planner.report import report
from planner.solve import chain_dp
from planner.workload import Workload
from vlm.model import find_model
from vlm.planning import plan_for, problem_for

FOLDER = Path(__file__).parent
SMALLEST_OF = ("1x24GiB", "2x24GiB", "4x24GiB", "8x24GiB")
ONE_LARGE = "a100-40g"
WORKLOAD = Workload()
NAMES = (
    *("internlm-xcomposer-7b", "internlm-xcomposer-vl-7b"),
    *("internlm-xcomposer2-7b", "internlm-xcomposer2-vl-7b", "internlm-xcomposer2-4khd-7b"),
    *("internlm-xcomposer2d5-7b", "internlm-xcomposer2d5-ol-7b"),
    *("internlm-7b", "internlm-20b", "internlm-chat-7b", "internlm-chat-20b"),
    *("internlm2-1_8b", "internlm2-7b", "internlm2-20b", "internlm-104b"),
    *("qwen-7b-chat", "qwen-7b-chat-int4", "qwen-7b-chat-int8", "qwen-vl-chat"),
    *("glm-4v-9b", "glm-4-9b-chat"),
    *("llama-2-7b-hf", "llama-2-13b-hf", "llama-2-70b-hf"),
)
CASES = {name: (name, WORKLOAD) for name in NAMES} | {
    "internlm-xcomposer2d5-7b-24-tiles": ("internlm-xcomposer2d5-7b", Workload(image_size=(2240, 3360))),
}
"""What each file is of: a model and its workload."""


def text_of(case: str) -> str:
    """Both reports, as a terminal of 100 columns without colour shows them; why, where one does not fit."""
    name, workload = CASES[case]
    model = find_model(name)
    smallest, text = next(
        ((spec, text) for spec in SMALLEST_OF for text in _reported(model, spec, workload)), (None, "")
    )
    parts = [f"== {smallest or f'more than {SMALLEST_OF[-1]}'}\n", text, f"\n== {ONE_LARGE}\n"]
    try:
        parts.append(_shown(report(plan_for(model, Machine.parse(ONE_LARGE), workload))))
    except InfeasibleError as problem:
        parts.append(f"{problem}\n")
    return "".join(parts)


def _reported(model, spec: str, workload: Workload) -> Iterator[str]:
    """The report on a machine; nothing where the model does not fit, of which nobody asks for advice."""
    machine = Machine.parse(spec)
    if chain_dp.fits(problem_for(model, machine, workload, Constraints())):
        yield _shown(report(plan_for(model, machine, workload)))


def _shown(renderable) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, no_color=True, highlight=False).print(renderable)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


if __name__ == "__main__":
    for case in CASES:
        (FOLDER / f"{case}.txt").write_text(text_of(case), encoding="utf-8")
