"""Proves every catalogue model for every kind of workload, at full size without weights, and writes vlm/proofs.yaml.

python benchmarks/prove_catalogue.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from planner.textfile import dump_mapping, write_atomically
from planner.workload import Workload, workload_class
from runtime.proving import HOOKS, installed_versions, rehearse_apart
from vlm.catalogue import catalogue_names, lookup
from vlm.model import Model, find_model

TARGET = Path(__file__).parents[1] / "vlm" / "proofs.yaml"


def kinds(model: Model) -> Iterator[Workload]:
    """One workload of every kind that a proof can cover."""
    images = (0, 1) if model.facts.vision else (0,)
    for num_images, batch_size, attention in product(images, (1, 2), ("sdpa", "eager")):
        chosen: Any = attention
        yield Workload(num_images=num_images, batch_size=batch_size, attention=chosen, prompt_tokens=64, new_tokens=4)


def main() -> int:
    """Run everything; exit 1, writing nothing, when a run meets a mismatch."""
    proven: dict[str, list[str]] = {}
    for name in sorted({lookup(alias).name for alias in catalogue_names()}):
        model = find_model(name)
        for workload in kinds(model):
            start_s = time.perf_counter()
            for hooks in HOOKS:
                run = rehearse_apart(model, workload, hooks)
                if not run.ok:
                    print(f"{name}: {run.mismatches[0]}", file=sys.stderr)
                    return 1
            covered = workload_class(replace(model.resolved(workload)))
            proven.setdefault(model.fingerprint, []).append(covered)
            print(f"{name:28s} {time.perf_counter() - start_s:5.1f} s  {covered}", flush=True)
    content = {"versions": installed_versions(), "hooks": ", ".join(HOOKS), "models": proven}
    write_atomically(TARGET, dump_mapping(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
