"""What the processes of a job compare before any of them reads a weight: plan, checkpoint and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from planner.errors import PlanMismatchError
from planner.plan import Plan
from runtime.pipeline.watch import Member
from vlm.checkpoint import Checkpoint
from vlm.versions import installed_versions

SAMPLE_BYTES = 2**16
"""Of every weight file's end: two checkpoints of one architecture have equal headers, and other values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What must be the same everywhere; `problem` is why a process cannot take part, empty when it can."""

    plan: str
    checkpoint: str
    versions: str
    problem: str = ""


def terms_of(plan: Plan, checkpoint: Checkpoint | None, problem: str = "") -> Terms:
    """This process's terms, without a checkpoint where it could not be read."""
    return Terms(
        plan=_digest(plan.to_yaml().encode()),
        checkpoint=checkpoint_digest(checkpoint) if checkpoint else "none",
        versions=installed_versions(),
        problem=problem,
    )


def refuse_disagreement(terms: Sequence[Terms], members: Sequence[Member]) -> None:
    """Raise PlanMismatchError when processes have other terms than the first stage's, or cannot take part."""
    problems = [f"{member}: {one.problem}" for member, one in zip(members, terms, strict=True) if one.problem]
    if problems:
        raise PlanMismatchError(f"not every process can take part. {' '.join(problems)}")
    first = min(range(len(members)), key=lambda position: members[position].stage)
    for part in (field.name for field in fields(Terms)):
        expected = getattr(terms[first], part)
        others = [
            f"{member} has {getattr(one, part)}"
            for member, one in zip(members, terms, strict=True)
            if getattr(one, part) != expected
        ]
        if others:
            raise PlanMismatchError(
                f"the processes have different {part}: {members[first]} has {expected}, {'; '.join(others)}. "
                f"Every process needs the same plan, checkpoint and versions."
            )


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Equal for copies of one checkpoint: config, every header, and a sample of every file's bytes."""
    headers = {name: [header.dtype, list(header.shape)] for name, header in sorted(checkpoint.tensors.items())}
    digest = hashlib.sha256(json.dumps([dict(checkpoint.config), headers], sort_keys=True).encode())
    for path in checkpoint.pickles or checkpoint.shards:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        digest.update(_tail(path))
    return digest.hexdigest()[:16]


def _tail(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
        return stream.read(SAMPLE_BYTES)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
