"""Proofs that need no run: those that ship with the catalogue, and those that the user's cache has kept.

`python benchmarks/prove_catalogue.py` writes proofs.yaml, from one run per model and kind of workload with everything
on a GPU of its own: any legal placement of the model then runs without a mismatch. A proof in the cache is one plan's.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from planner.plan import Plan
from planner.textfile import dump_mapping, read_mapping, write_atomically
from planner.workload import Workload, workload_class
from vlm.versions import installed_versions

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


def with_weights_named(plan: Plan) -> Plan:
    """The plan with its proof saying in which dtype all weights were when it ran, where the plan quantises some."""
    if plan.quantization is None or plan.proof.get("status") != "proven":
        return plan
    return replace(plan, proof={**plan.proof, "weights": f"all in {plan.model.dtype}"})


def proof_digest(plan: Plan) -> str:
    """Equal for plans that one run proves: the same model, map, kind of workload and installed versions."""
    question = [plan.fingerprint, dict(plan.placement), workload_class(plan.workload), installed_versions()]
    return hashlib.sha256(repr(question).encode()).hexdigest()[:16]


def kept_proof(folder: Path, plan: Plan) -> dict[str, str] | None:
    """The proof of a plan that an earlier run left in the cache, if there is one; a damaged one is as good as none."""
    with suppress(SourceError):
        found = read_mapping(folder / f"proof-{proof_digest(plan)}.yaml", "proof", SourceError)
        return {str(key): str(value) for key, value in found.items()} if found.get("status") == "proven" else None
    return None


def keep_proof(folder: Path, plan: Plan) -> None:
    """Leave a proven plan's proof in the cache; where that cannot be written, the next run proves it anew."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"proof-{proof_digest(plan)}.yaml", dump_mapping(dict(plan.proof)))


@cache
def _proofs() -> dict[str, Any]:
    return read_mapping(Path(__file__).with_name("proofs.yaml"), "proofs", SourceError)
