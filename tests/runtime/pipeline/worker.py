"""What torchrun starts in these tests: models in turn, each through a pipeline of all processes.

usage: worker.py JOB.json. The job lists cases; the first stage writes what came out into each case's `out`.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from runtime.pipeline.agreement import DisagreementError
from runtime.pipeline.engine import Batch
from runtime.pipeline.pipeline import Pipeline
from runtime.quiet import quiet_libraries


def batches_of(case: dict[str, Any]) -> list[Batch]:
    """The case's batches, with their requests numbered in order."""
    made: list[Batch] = []
    number = 0
    for inputs in torch.load(case["inputs"], weights_only=True):
        count = len(inputs["input_ids"])
        indexes = tuple(range(number, number + count))
        seeds = tuple(case.get("seed", 0) + index for index in indexes)
        made.append(Batch(indexes=indexes, inputs=inputs, seeds=seeds))
        number += count
    return made


def run(case: dict[str, Any]) -> None:
    """One case, on this process's stage."""
    rank = int(os.environ["RANK"])
    folder = case["folders"][rank] if "folders" in case else case["folder"]
    try:
        pipeline = Pipeline(case["plan"], folder, devices=case.get("devices", "cpu"))
    except DisagreementError as refusal:
        if rank == 0:
            Path(case["out"]).write_text(json.dumps({"refusal": str(refusal)}))
        return
    answers: dict[int, list[int]] = {}
    with pipeline:
        for finished in pipeline.generate_batches(batches_of(case), case["options"], case.get("num_slots")):
            answers |= dict(zip(finished.batch.indexes, map(list, finished.answers), strict=True))
        schedule = pipeline.schedule()
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (pipeline.stage, pipeline.num_read_bytes))
    if pipeline.is_first and schedule is not None:
        phases = sorted({(task.stage, task.phase) for task in schedule.tasks})
        found = {"answers": answers, "read_bytes": dict(everybody), "phases": phases, "chart": schedule.chart()}
        Path(case["out"]).write_text(json.dumps(found))


def run_script(name: str, arguments: list[str]) -> None:
    """A script, as if torchrun had started it."""
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")


def main() -> None:
    """Run all cases, each in the first processes of this job, as if it were one of so many."""
    # Else every collection would look through all that was imported.
    gc.freeze()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with quiet_libraries():
        for case in json.loads(Path(sys.argv[1]).read_text()):
            if int(os.environ["RANK"]) < case["num_stages"]:
                os.environ["WORLD_SIZE"] = str(case["num_stages"])
                run_script(*case["script"]) if "script" in case else run(case)
                gc.collect()


main()
