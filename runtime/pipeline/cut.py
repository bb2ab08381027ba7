"""From flows and a plan to what each stage does: the atoms it runs, what stands for the others, and what it sends.

Every stage runs the whole forward's Python. Modules of other stages are replaced by stand-ins, which compute nothing:
one whose value the stage needs receives it, one whose value it does not need returns a tensor of the right size, and
one of a later stage ends the forward, because nothing of this stage comes after it. Everything between modules runs
on every stage, on what is real there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from planner.errors import UnsupportedModelError
from planner.paths import owner
from planner.plan import Plan
from runtime.pipeline.flows import Call, Flows, Source

SINGLE = "Run it in one process: plan-devices run without --pipeline"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRule:
    """A result's shape: the first `num_kept` sizes of the first argument, then `tail`."""

    num_kept: int
    tail: tuple[int, ...]
    dtype: torch.dtype

    def shape(self, first: Sequence[int]) -> tuple[int, ...]:
        """The shape that follows from the first argument's."""
        return (*first[: self.num_kept], *self.tail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standin:
    """What is called in place of a module of an earlier stage: `has_value` says whether its value comes over.

    Without a `rule` its owner says each time what the result looks like. `fills` are layers of the cache that the
    module fills: models ask whether they are empty, to leave the module out.
    """

    owner: int
    has_value: bool
    rule: SizeRule | None
    fills: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """That a module's result goes to a later stage: its value, its looks, or both."""

    target: int
    value: bool
    looks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one stage does in every forward.

    `atoms` are those it runs, `weights` those whose tensors it holds; `ends` are modules of later stages. `inputs` are
    the floating inputs whose values it needs. `witnesses` are cache layers of other stages whose length it keeps.
    `unseen` are modules that did not run when the flows were followed, and that no stage has. `first_layer` is the
    first atom that makes the cache longer: until there a prompt is about pictures. None where none does.
    """

    stage: int
    atoms: tuple[str, ...]
    weights: frozenset[str]
    standins: Mapping[str, Standin]
    ends: frozenset[str]
    sends: Mapping[str, tuple[Send, ...]] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    witnesses: tuple[int, ...] = ()
    unseen: frozenset[str] = frozenset()
    first_layer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A model's parts in stage order. `moved` are atoms run on a later stage than planned, such as a tied head.

    `state` are attributes of modules that each group of requests needs its own values of.
    """

    parts: tuple[Part, ...]
    moved: Mapping[str, tuple[int, int]]
    state: tuple[tuple[str, str], ...]


def cut(flows: Flows, plan: Plan) -> Cut:
    """How a model whose flows are known runs in the plan's stages.

    Raises: UnsupportedModelError when a stage would need something of a later one, or of a place that nothing crosses.
    """
    if not flows.has_cache:
        raise UnsupportedModelError(
            f"{plan.model.name} keeps no cache between tokens, which a pipeline needs. {SINGLE}"
        )
    planned = _planned_stages(flows, plan)
    stages = _stages_in_order(flows, planned, plan)
    _refuse_secrets(flows, stages, plan)
    drafts = [_Draft(flows, stages, stage, len(plan.stages)) for stage in range(len(plan.stages))]
    parts = [draft.part() for draft in drafts]
    sends = _sends(flows, parts)
    return Cut(
        parts=tuple(replace(part, sends=sends.get(part.stage, {})) for part in parts),
        moved={atom: (planned[atom], stage) for atom, stage in stages.items() if planned[atom] != stage},
        state=flows.state,
    )


def _planned_stages(flows: Flows, plan: Plan) -> dict[str, int]:
    index = {stage.device: number for number, stage in enumerate(plan.stages)}
    return {atom: index[plan.placement[owner(atom, plan.placement) or ""]] for atom in flows.atoms}


def _stages_in_order(flows: Flows, planned: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """The planned stages, but no atom on an earlier one than what runs before it."""
    found: dict[str, int] = dict(planned)
    for phase in ("prefill", "decode"):
        current = 0
        for call in _atom_calls(flows, phase):
            found[call.module] = current = max(found[call.module], current)
    for phase in ("prefill", "decode"):
        current = 0
        for call in _atom_calls(flows, phase):
            if found[call.module] < current:
                raise UnsupportedModelError(
                    f"{plan.model.name} cannot be cut here: {call.module} runs on stage {found[call.module]} and again "
                    f"after stage {current} has begun, so that a forward would go back. {SINGLE}"
                )
            current = found[call.module]
    return found


def _atom_calls(flows: Flows, phase: Literal["prefill", "decode"]) -> Iterator[Call]:
    """Calls of atoms with weights, each step of a phase after the other; only the first decode step."""
    atoms = set(flows.atoms) - flows.everywhere
    for call in flows.calls:
        if call.phase == phase and call.module in atoms:
            yield call
        if call.phase == phase and call.module == "":
            return


def _refuse_secrets(flows: Flows, stages: Mapping[str, int], plan: Plan) -> None:
    for secret in flows.secrets:
        for source in secret.sources:
            if source.kind in ("output", "inside") and stages[source.name] != stages[secret.atom]:
                raise UnsupportedModelError(
                    f"{plan.model.name} cannot be cut here: {secret.atom} reads what {source.name} left behind without "
                    f"being given it ({secret.place}), and they are on stages {stages[secret.atom]} and "
                    f"{stages[source.name]}. Pin them to one device, or: {SINGLE}"
                )


class _Draft:
    """What one stage needs, found step by step: every need shows more of what has to run there."""

    def __init__(self, flows: Flows, stages: Mapping[str, int], stage: int, num_stages: int) -> None:
        self._flows = flows
        self._stages = stages
        self._stage = stage
        self._is_last = stage == num_stages - 1
        self._own = {atom for atom in _called(flows) if stages[atom] == stage}
        self._received: set[str] = set()
        self._weights: set[str] = set()
        self._inputs: set[str] = set()

    def part(self) -> Part:
        """The part, without what it sends."""
        while True:
            blank = self._blank()
            if not self._add(self._needs(blank)):
                break
        grown = {layer for call in self._flows.calls if call.module in self._own for layer in call.grown}
        return Part(
            stage=self._stage,
            atoms=tuple(atom for atom in self._flows.atoms if atom in self._own),
            weights=frozenset(self._own | self._weights | self._flows.everywhere),
            standins={**self._blank_standins(blank), **self._received_standins()},
            ends=frozenset(name for name, stages in blank.items() if min(stages) > self._stage),
            inputs=frozenset(self._inputs),
            witnesses=tuple(sorted(self._flows.witnesses - grown)),
            first_layer=next((c.module for c in self._flows.calls if c.module in self._own and c.grown), None),
            unseen=frozenset(self._flows.modules - self._flows.everywhere - set(_called(self._flows))),
        )

    def _blank(self) -> dict[str, set[int]]:
        """Modules of which this stage needs nothing, with the stages of the atoms in them."""
        inside: dict[str, set[int]] = {}
        excluded: set[str] = set()
        for atom in _called(self._flows):
            for name in _ancestry(atom):
                inside.setdefault(name, set()).add(self._stages[atom])
                if atom in self._own or atom in self._received:
                    excluded.add(name)
        return {
            name: stages
            for name, stages in inside.items()
            if name not in excluded and (min(stages) > self._stage or max(stages) < self._stage)
        }

    def _needs(self, blank: Mapping[str, set[int]]) -> set[Source]:
        needed = {source for call in self._flows.calls if call.module in self._own for source in call.sources}
        end = self._end()
        for choice in self._flows.choices:
            if choice.num_calls_before < end and not any(name in blank for name in choice.within):
                needed |= choice.sources
        return needed | (self._flows.results if self._is_last else set())

    def _end(self) -> int:
        """How many calls of the prefill are over when the first module of a later stage is reached."""
        for index, call in enumerate(self._flows.calls):
            if self._stages.get(call.module, 0) > self._stage and call.module not in self._flows.everywhere:
                return index
        return len(self._flows.calls)

    def _add(self, needs: set[Source]) -> bool:
        """Take over what is needed; whether any of it was new."""
        before = len(self._received) + len(self._weights) + len(self._inputs)
        for source in needs:
            if source.kind == "input":
                self._inputs.add(source.name)
            elif source.kind == "weights":
                self._weights |= {source.name} - self._own
            elif source.kind == "inside" and self._stages[source.name] != self._stage:
                raise UnsupportedModelError(
                    f"stage {self._stage} needs what {source.name} on stage {self._stages[source.name]} keeps and does "
                    f"not return, such as keys that layers share. Pin them to one device, or: {SINGLE}"
                )
            elif self._stages[source.name] < self._stage:
                self._received.add(source.name)
            elif self._stages[source.name] > self._stage:
                raise UnsupportedModelError(
                    f"stage {self._stage} needs what {source.name} on stage {self._stages[source.name]} gives: a "
                    f"forward would go back. {SINGLE}"
                )
        return len(self._received) + len(self._weights) + len(self._inputs) > before

    def _blank_standins(self, blank: Mapping[str, set[int]]) -> dict[str, Standin]:
        return {
            name: self._standin(name, max(stages), has_value=False)
            for name, stages in blank.items()
            if max(stages) < self._stage
        }

    def _received_standins(self) -> dict[str, Standin]:
        return {name: self._standin(name, self._stages[name], has_value=True) for name in self._received}

    def _standin(self, name: str, owner: int, *, has_value: bool) -> Standin:
        fills = {layer for call in self._flows.calls if call.module == name for layer in call.filled}
        return Standin(owner=owner, has_value=has_value, rule=_rule(self._flows, name), fills=tuple(sorted(fills)))


def _called(flows: Flows) -> list[str]:
    """Atoms with weights that were called, in order."""
    atoms = set(flows.atoms) - flows.everywhere
    return list(dict.fromkeys(call.module for call in flows.calls if call.module in atoms))


def _ancestry(name: str) -> list[str]:
    """A module and all around it but the root."""
    parts = name.split(".")
    return [".".join(parts[: length + 1]) for length in range(len(parts))]


def _rule(flows: Flows, module: str) -> SizeRule | None:
    """What calls of different sizes have in common; None where that is not enough to tell."""
    calls = [call for call in flows.calls if call.module == module]
    seen = {(call.first_shape, call.out_shape, call.out_dtype) for call in calls}
    if any(None in one for one in seen) or len({dtype for _, _, dtype in seen}) > 1:
        return None
    # An element of a list that gives back the size it got is a block, and will do so for other sizes.
    is_block = module.rpartition(".")[2].isdigit() and all(first == out for first, out, _ in seen)
    if len({first for first, _, _ in seen}) < 2 and not is_block:
        return None
    # Of the most sizes: what is kept of a long argument is all of a short one, such as ids without a batch.
    _, longest, dtype = max(seen, key=lambda one: len(one[1] or ()))
    assert longest is not None and dtype is not None
    for num_kept in range(len(longest), -1, -1):
        rule = SizeRule(num_kept=num_kept, tail=longest[num_kept:], dtype=dtype)
        if all(first is not None and rule.shape(first) == out for first, out, _ in seen):
            return rule
    return None


def _sends(flows: Flows, parts: Sequence[Part]) -> dict[int, dict[str, tuple[Send, ...]]]:
    """By stage and module: who gets what of its result. Of nested stand-ins the outermost that is called counts."""
    found: dict[int, dict[str, tuple[Send, ...]]] = {}
    for part in parts:
        for name in _outermost(flows, part):
            standin = part.standins[name]
            send = Send(target=part.stage, value=standin.has_value, looks=standin.rule is None)
            if send.value or send.looks:
                of_owner = found.setdefault(standin.owner, {})
                of_owner[name] = (*of_owner.get(name, ()), send)
    return found


def _outermost(flows: Flows, part: Part) -> Iterator[str]:
    called = {
        call.module
        for call in flows.calls
        if call.module in part.standins and not any(outer in part.standins for outer in call.within)
    }
    yield from (name for name in part.standins if name in called)
