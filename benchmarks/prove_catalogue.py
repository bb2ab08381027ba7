"""Proves every catalogue model for every kind of workload, at full size without weights, and writes vlm/proofs.yaml.

python benchmarks/prove_catalogue.py              all models
python benchmarks/prove_catalogue.py llava qwen2  those whose names contain one of these; the others' proofs stay
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from planner.textfile import dump_mapping, read_mapping, write_atomically
from planner.workload import Workload, workload_class
from runtime.mismatch import Mismatch
from runtime.proving import HOOKS, rehearse_apart, rehearse_cuts
from vlm.catalogue import catalogue_names, lookup
from vlm.cost_library import read_shipped, variant
from vlm.model import Model, find_model
from vlm.traced import TracedModel
from vlm.versions import installed_versions

TARGET = Path(__file__).parents[1] / "vlm" / "proofs.yaml"


def kinds(model: Model) -> Iterator[Workload]:
    """One workload of every kind that costs are on file for."""
    shipped = read_shipped(model.catalogue_stem or "") if isinstance(model, TracedModel) else None
    images = (0, 1) if model.has_images else (0,)
    for num_images, batch_size, attention in product(images, (1, 2), ("sdpa", "eager")):
        chosen: Any = attention
        workload = Workload(
            num_images=num_images, batch_size=batch_size, attention=chosen, prompt_tokens=64, new_tokens=4
        )
        if shipped is None or variant(replace(workload, dtype="bfloat16")) in shipped:
            yield workload


def mismatch(model: Model, workload: Workload) -> Mismatch | None:
    """The first mismatch of any run that the proof of a kind of workload rests on."""
    runs = chain(
        (rehearse_apart(model, workload, hooks) for hooks in HOOKS), rehearse_cuts(model, workload, "accelerate")
    )
    return next((run.mismatches[0] for run in runs if not run.ok), None)


def main() -> int:
    """Run everything, and write each model's proofs as they come; exit 1 at a mismatch."""
    asked = sys.argv[1:]
    entries = {lookup(alias).name: lookup(alias) for alias in catalogue_names()}
    stems = sorted(name for name, entry in entries.items() if entry.like is None)
    proven: dict[str, list[str]] = dict(read_mapping(TARGET, "proofs", SourceError)["models"]) if asked else {}
    for name in (stem for stem in stems if not asked or any(part in stem for part in asked)):
        model = find_model(name)
        covered: list[str] = []
        for workload in kinds(model):
            start_s = time.perf_counter()
            found = mismatch(model, workload)
            if found:
                print(f"{name}: {found}", file=sys.stderr)
                return 1
            covered.append(workload_class(model.resolved(workload)))
            print(f"{name:36s} {time.perf_counter() - start_s:5.1f} s  {covered[-1]}", flush=True)
        proven[model.fingerprint] = covered
        content = {"versions": installed_versions(), "hooks": ", ".join(HOOKS), "models": proven}
        write_atomically(TARGET, dump_mapping(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
