"""What the processes of a job compare before any of them reads a weight: plan, checkpoint and versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from planner.errors import PlanMismatchError
from planner.plan import Plan
from runtime.pipeline.members import Member, by_stage
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
        versions=installed_versions("plan-devices"),
        problem=problem,
    )


class DisagreementError(PlanMismatchError):
    """What all processes find out together, and none of them alone has done."""


def refuse_disagreement(terms: Sequence[Terms], members: Sequence[Member]) -> None:
    """Raise DisagreementError when processes have other terms than the first stage's, or cannot take part.

    `terms` are by rank, as `members` are.
    """
    _refuse_problems(terms, members)
    first = by_stage(members)[0]
    for part in (field.name for field in fields(Terms)):
        found = {member: getattr(terms[member.rank], part) for member in by_stage(members)}
        others = [f"{member} has {value}" for member, value in found.items() if value != found[first]]
        if others:
            raise DisagreementError(
                f"the processes have different {part}: {first} has {found[first]}, {'; '.join(others)}. "
                "Every process needs the same plan, checkpoint and versions"
            )


def _refuse_problems(terms: Sequence[Terms], members: Sequence[Member]) -> None:
    """Raise DisagreementError with the problems that processes have found: each once, with who has it."""
    who: dict[str, list[Member]] = {}
    for member in by_stage(members):
        if terms[member.rank].problem:
            who.setdefault(terms[member.rank].problem.rstrip("."), []).append(member)
    if who:
        told = [
            problem if len(some) == len(members) else f"{' and '.join(map(str, some))}: {problem}"
            for problem, some in who.items()
        ]
        raise DisagreementError(". ".join(told))


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
