"""Proofs that ship with the catalogue: kinds of workload that any legal placement of a model runs without a mismatch.

`python benchmarks/prove_catalogue.py` writes proofs.yaml, from one run per model and kind with everything on a GPU of
its own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from planner.textfile import read_mapping
from planner.workload import Workload, workload_class

UNPROVEN = {"status": "unproven"}


def stored_proof(fingerprint: str, workload: Workload) -> dict[str, str]:
    """The proof on file for a model and a resolved workload's kind, or that there is none."""
    proofs = _proofs()
    covered = workload_class(workload)
    if covered not in proofs["models"].get(fingerprint, ()):
        return UNPROVEN
    return {
        "status": "proven",
        "hooks": proofs["hooks"],
        "workload_class": covered,
        "versions": proofs["versions"],
        "fingerprint": fingerprint,
    }


@cache
def _proofs() -> dict[str, Any]:
    return read_mapping(Path(__file__).with_name("proofs.yaml"), "proofs", SourceError)
