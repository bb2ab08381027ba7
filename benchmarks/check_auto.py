"""What transformers' own `device_map="auto"` does to every image-text-to-text model type, diagnosed and repaired.

    python benchmarks/check_auto.py                  all types; writes docs/auto.md
    python benchmarks/check_auto.py udop florence2   these types; writes nothing, exits 1 when a repair is missing

Models are built tiny. Each is planned by transformers for 2, 3 and 4 GPUs that could each hold it one and a half times,
and that map is diagnosed: forward, decode steps and generate() on virtual GPUs, under accelerate's hooks.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import accelerate
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from planner.diagnosis.diagnosis import HAZARDS, Diagnosis
from planner.errors import UnsupportedModelError
from planner.machine import Machine
from runtime.diagnosis.auto_maps import auto_map
from runtime.diagnosis.diagnosis import diagnose
from vlm.inputs import example_inputs
from vlm.tiny import tiny_model

COUNTS = (2, 3, 4)
ROOM = 1.5
TABLE = Path(__file__).parents[1] / "docs" / "auto.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model type's outcome: by number of GPUs what the map did, and what was found. `skipped` says why not."""

    model_type: str
    results: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    num_failing: int = 0
    num_repaired: int = 0
    skipped: str = ""
    seconds: float = 0.0


def check(model_type: str) -> Row:
    """The outcome of one type."""
    start_s = time.perf_counter()
    try:
        row = _diagnosed(model_type)
    except Exception as error:  # the point of a sweep is to go on
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:120]
        row = Row(model_type=model_type, skipped=f"{type(error).__name__}: {message} ({Path(frame.filename).name})")
    gc.collect()
    return replace(row, seconds=time.perf_counter() - start_s)


def _diagnosed(model_type: str) -> Row:
    model, _ = tiny_model(model_type)
    inputs = example_inputs(model)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    results: list[str] = []
    found: Counter[str] = Counter()
    num_failing = num_repaired = 0
    for count in COUNTS:
        machine = Machine.parse(f"{count}x{int(ROOM * weight_bytes)}B")
        try:
            given = auto_map(model, "auto", machine)
        except UnsupportedModelError as problem:
            results.append("no map")
            found[str(problem).partition(":")[2].strip()] += 1
            continue
        diagnosis = diagnose(model, inputs, given)
        num_failing += not diagnosis.safe
        num_repaired += not diagnosis.safe and diagnosis.repair is not None and diagnosis.repair.proven
        results.append(_result(diagnosis))
        found.update(_shown(diagnosis))
    return Row(
        model_type=model_type,
        results=tuple(results),
        found=tuple(found),
        num_failing=num_failing,
        num_repaired=num_repaired,
    )


def _result(diagnosis: Diagnosis) -> str:
    used = len({place for place in diagnosis.device_map.values() if isinstance(place, int)})
    if diagnosis.safe:
        return f"clean on {used}"
    repair = diagnosis.repair
    if repair is None or not repair.proven:
        return "fails"
    return f"repaired, {len(repair.moves)} move{'s'[: len(repair.moves) != 1]}"


def _shown(diagnosis: Diagnosis) -> Iterator[str]:
    for finding in diagnosis.of("will fail"):
        place = f" at {finding.place.rpartition('/')[2]}" if finding.place else ""
        yield f"{finding.hazard}: {finding.title.partition(':')[0]}{place}"


def _table(rows: list[Row]) -> str:
    ran = [row for row in rows if not row.skipped]
    failing = sum(row.num_failing for row in ran)
    repaired = sum(row.num_repaired for row in ran)
    maps = sum(len(row.results) - row.results.count("no map") for row in ran)
    stopped = sum(row.results.count("no map") for row in ran)
    types = sum(row.num_failing > 0 or "no map" in row.results for row in ran)
    lines = [
        '# `device_map="auto"`, diagnosed',
        "",
        f"Written by `python benchmarks/check_auto.py`: transformers {transformers.__version__}, torch "
        f"{torch.__version__.partition('+')[0]}, accelerate {accelerate.__version__}.",
        "Every image-text-to-text model type is built tiny, planned by transformers' own `auto` for 2, 3 and 4 GPUs",
        "that could each hold it one and a half times, and that map is run on virtual GPUs under accelerate's hooks: a",
        "forward, decode steps, `generate()`.",
        "",
        f"**{types} of {len(ran)} types break on at least one of the three.** {failing} of {maps} maps fail, and for "
        f"{stopped} more transformers' planner stops.",
        f"**{repaired} of {failing} failing maps are repaired** by moving what a trace shows to belong together, each",
        "proven by a run. Cuts are of these tiny models: a real one is cut elsewhere, by its sizes, and may meet more",
        "of these places or fewer.",
        "",
        "| type | 2 GPUs | 3 GPUs | 4 GPUs | what fails, and where |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        results = row.results or ("", "", "")
        found = "<br>".join(row.found).replace("|", "\\|") or (f"not run: {row.skipped}" if row.skipped else "")
        lines.append(f"| {row.model_type} | {' | '.join(results)} | {found} |")
    lines += ["", "The classes:", ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in HAZARDS.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check the types asked for, printing a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    asked = parser.parse_args().model_types
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    rows = []
    for model_type in asked or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        rows.append(row := check(model_type))
        print(f"{model_type:24s} {row.seconds:5.1f} s  {row.skipped or ', '.join(row.results)}", flush=True)
        for line in row.found:
            print(f"    {line}")
    if not asked:
        TABLE.write_text(_table(rows), encoding="utf-8")
    return int(bool(asked) and any(row.skipped or row.num_repaired < row.num_failing for row in rows))


if __name__ == "__main__":
    sys.exit(main())
