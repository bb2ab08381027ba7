"""Every image-text-to-text model type of the installed transformers, tiny, planned and run split on virtual GPUs.

    python benchmarks/sweep.py                    all types; writes docs/sweep.md
    python benchmarks/sweep.py llava qwen2_5_vl   these types; writes nothing, exits 1 when one is not clean

A type is clean when its plans for 2, 3 and 4 devices run without a mismatch under our hooks and accelerate's, prefill
and decode steps, with logits equal to the whole model's bit for bit. Inside one process, errors are caught per type.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from planner import Machine
from runtime.planning import plan_model
from runtime.proof import dry_run
from runtime.steps import forward_and_decode
from vlm.inputs import example_inputs
from vlm.tiny import tiny_model

COUNTS = (2, 3, 4)
HOOKS = ("ours", "accelerate")
TABLE = Path(__file__).parents[1] / "docs" / "sweep.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model type's outcome; `problem` is empty when it is clean."""

    model_type: str
    num_groups: int = 0
    num_steps: int = 0
    devices_used: tuple[int, ...] = ()
    problem: str = ""
    seconds: float = 0.0


class _NoWatch:
    phase: Any = "prefill"

    def note_cache(self, cache: Any) -> None:
        pass


def check(model_type: str) -> Row:
    """The outcome of one type."""
    start_s = time.perf_counter()
    try:
        row = _planned_and_run(model_type)
    except Exception as error:  # the point of a sweep is to go on
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:120]
        problem = f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"
        row = Row(model_type=model_type, problem=problem)
    gc.collect()
    return Row(
        model_type=row.model_type,
        num_groups=row.num_groups,
        num_steps=row.num_steps,
        devices_used=row.devices_used,
        problem=row.problem,
        seconds=time.perf_counter() - start_s,
    )


def _planned_and_run(model_type: str) -> Row:
    model, _ = tiny_model(model_type)
    inputs = example_inputs(model)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = forward_and_decode()(model, inputs, _NoWatch())
    used, problems = [], []
    for count in COUNTS:
        plan = plan_model(model, inputs, machine=Machine.parse(f"{count}x24GiB"))
        used.append(len(set(plan.device_map.values())))
        problems += [f"{count} devices, {problem}" for problem in _faults(model, inputs, plan, expected)]
    return Row(
        model_type=model_type,
        num_groups=len(plan.placement),
        num_steps=len(expected),
        devices_used=tuple(used),
        problem="; ".join(problems),
    )


def _faults(model: Any, inputs: Any, plan: Any, expected: list[Any]) -> Iterator[str]:
    for hooks in HOOKS:
        torch.manual_seed(0)
        run = dry_run(model, inputs, plan, hooks=hooks)
        if not run.ok:
            yield f"{hooks}: {run.mismatches[0]}"
        elif not all(torch.equal(ours, theirs) for ours, theirs in zip(run.results, expected, strict=True)):
            yield f"{hooks}: logits differ"


def _table(rows: list[Row]) -> str:
    clean = sum(not row.problem for row in rows)
    lines = [
        "# Every image-text-to-text model type, split",
        "",
        f"Written by `python benchmarks/sweep.py`: transformers {transformers.__version__}, torch "
        f"{torch.__version__.partition('+')[0]}, accelerate {accelerate.__version__}. **{clean} of {len(rows)}** types "
        "are clean: their plans for 2, 3 and 4 devices run without a mismatch, under our hooks and accelerate's,",
        "prefill and decode steps, with logits equal to the whole model's bit for bit. Models are built tiny from",
        "their config classes; no weights are trained, no GPU is involved.",
        "",
        "| type | map entries | steps | devices used | result |",
        "|---|---:|---:|---|---|",
    ]
    for row in rows:
        used = "/".join(map(str, row.devices_used))
        result = row.problem.replace("|", "\\|") or "clean"
        lines.append(f"| {row.model_type} | {row.num_groups or ''} | {row.num_steps or ''} | {used} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the types asked for, printing a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    asked = parser.parse_args().model_types
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for model_type in asked or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        rows.append(check(model_type))
        print(f"{model_type:24s} {rows[-1].seconds:5.1f} s  {rows[-1].problem or 'clean'}", flush=True)
    if not asked:
        TABLE.write_text(_table(rows), encoding="utf-8")
    return int(bool(asked) and any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
