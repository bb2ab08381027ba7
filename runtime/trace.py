"""Runs a model with every atom on a virtual GPU of its own, and reads off what must share a device.

Atoms whose tensors meet in one operation are merged, and the run is repeated until nothing meets that is apart. What
is left are groups that may be placed freely, with what flows between them and what they cost.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

import torch
from torch import nn

from planner.paths import owner
from runtime.atoms import Atom, find_atoms
from runtime.devices import UNLIMITED_BYTES
from runtime.mismatch import Mismatch, unique
from runtime.recorder import INPUTS_LABEL, Recorder, storage_id
from runtime.refusals import explained
from runtime.relocate import relocate, skip_keys
from runtime.steps import Steps
from runtime.twin import make_twin
from runtime.virtual import virtual_gpus
from runtime.virtual.process import PROCESS

MAX_ROUNDS = 8
MAX_LABELS = 127
"""Device indices are 8-bit signed."""
LONGEST_RUN = 32
"""Blocks of other lists that share a label before those of the longest list do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Groups that a run showed to belong together, by their atoms, and the operation that showed it."""

    groups: tuple[tuple[str, ...], ...]
    cause: Mismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A run without a mismatch between GPUs.

    `groups` are atoms by label; label 0 is the inputs' and may have none. `weight_bytes` are by label. `hazards` are
    operands left on the host, which no placement mends.
    """

    groups: tuple[tuple[Atom, ...], ...]
    merges: tuple[Merge, ...]
    hazards: tuple[Mismatch, ...]
    record: Recorder
    weight_bytes: tuple[int, ...]
    num_rounds: int
    batch_size: int


def trace_model(
    model: nn.Module, inputs: Mapping[str, Any], steps: Steps, known_groups: Sequence[tuple[Atom, ...]] | None = None
) -> Trace:
    """The trace of `steps`, which runs a copy of `model` on `inputs` on virtual GPUs.

    Atoms start in the groups of an earlier trace, when those are given, and alone otherwise.
    Raises: UnsupportedModelError when the model's code refuses the inputs; RuntimeError when merging does not settle,
    which would be our own mistake.
    """
    batch_size = len(prompt_of(inputs))
    groups = list(known_groups) if known_groups else _with_ties(model, _first_groups(find_atoms(model)))
    merges: list[Merge] = []
    for num_rounds in range(1, MAX_ROUNDS + 1):
        record, weight_bytes = _run(model, groups, inputs, steps)
        if not record.met:
            hazards = unique([mismatch for mismatch in record.mismatches if mismatch.kind == "host"])
            return Trace(
                groups=tuple(groups),
                merges=tuple(merges),
                hazards=hazards,
                record=record,
                weight_bytes=weight_bytes,
                num_rounds=num_rounds,
                batch_size=batch_size,
            )
        merges += [Merge(groups=tuple(_names(groups[label]) for label in labels), cause=c) for labels, c in record.met]
        groups = _merged(groups, (labels for labels, _ in record.met))
    raise RuntimeError(f"merging did not settle in {MAX_ROUNDS} rounds: {record.met[-1][1]}")


def prompt_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The input whose shape says batch and length: the token ids, or else the first tensor."""
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    found = inputs.get("input_ids", tensors[0] if tensors else None)
    if not isinstance(found, torch.Tensor) or not found.dim():
        raise ValueError(f"the inputs {list(inputs)} hold no tensor of a batch: give the forward's keyword arguments")
    return found


def is_shape_only(model: nn.Module) -> bool:
    """Whether the model has no values: its parameters are on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


def _first_groups(atoms: Iterable[Atom]) -> list[tuple[Atom, ...]]:
    """Every atom alone, but for the root's own tensors: accelerate keeps those where the inputs are.

    Where there are more atoms than labels, neighbours in the module lists go together, in the longest list last: that
    is the language model's, whose layers are worth placing one by one.
    """
    atoms = tuple(atoms)
    at_root = tuple(atom for atom in atoms if not atom.is_module and "." not in atom.name)
    others = [atom for atom in atoms if atom not in at_root]
    lengths = Counter(atom.module_list for atom in others if atom.module_list)
    longest = max(lengths, key=lambda name: lengths[name], default=None)
    for longest_run, other_run in ((own, rest) for own in count(1) for rest in range(own, own + LONGEST_RUN)):
        groups = [at_root, *_runs(others, other_run, {longest: longest_run})]
        if len(groups) <= MAX_LABELS:
            return groups
    raise AssertionError("unreachable: runs grow until they fit")


def _runs(atoms: list[Atom], run_length: int, lengths: Mapping[str | None, int]) -> Iterator[tuple[Atom, ...]]:
    """Atoms alone, but elements of one module list in runs of `run_length`, or of what `lengths` says for the list."""
    for module_list, same in groupby(atoms, key=lambda atom: atom.module_list):
        members = list(same)
        step = 1 if module_list is None else lengths.get(module_list, run_length)
        yield from (tuple(members[start : start + step]) for start in range(0, len(members), step))


def _with_ties(model: nn.Module, groups: list[tuple[Atom, ...]]) -> list[tuple[Atom, ...]]:
    """The groups with those merged that share a parameter: accelerate ties it again, to one of its names' devices."""
    label_of = {atom.name: label for label, group in enumerate(groups) for atom in group}
    sharing: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owned_by = owner(name, label_of)
        if owned_by is not None:  # a shared module is an atom under its first name alone
            sharing.setdefault(id(parameter), set()).add(label_of[owned_by])
    return _merged(groups, (frozenset(labels) for labels in sharing.values() if len(labels) > 1))


def _merged(groups: list[tuple[Atom, ...]], meetings: Iterable[frozenset[int]]) -> list[tuple[Atom, ...]]:
    """The groups after every set of labels in `meetings` has become one, in the order of first members."""
    target = list(range(len(groups)))

    def root(label: int) -> int:
        while target[label] != label:
            label = target[label]
        return label

    for labels in meetings:
        first = min(map(root, labels))
        for label in labels:
            target[root(label)] = first
    joined: dict[int, list[Atom]] = {}
    for label, group in enumerate(groups):
        joined.setdefault(root(label), []).extend(group)
    return [tuple(group) for group in joined.values()]


def _run(
    model: nn.Module, groups: list[tuple[Atom, ...]], inputs: Mapping[str, Any], steps: Steps
) -> tuple[Recorder, tuple[int, ...]]:
    gpus = virtual_gpus([UNLIMITED_BYTES] * len(groups), shape_only=is_shape_only(model), block_bytes=1)
    label_of = {atom.name: label for label, group in enumerate(groups) for atom in group}
    names = ["the inputs", *(group[0].name for group in groups[1:])]
    recorder = Recorder(names, gpus.ledger)

    def device_of(name: str) -> torch.device:
        return gpus.devices[label_of[owner(name, label_of) or ""]]

    twin = make_twin(model, device_of)
    weight_bytes = tuple(gpus.ledger.allocated_bytes(label) for label in range(len(groups)))
    _hook(twin, groups, recorder)
    home = gpus.devices[INPUTS_LABEL]
    placed = relocate(dict(inputs), lambda tensor: tensor.to(home))
    recorder.pixel_storages = frozenset(
        storage_id(value) for value in placed.values() if isinstance(value, torch.Tensor) and value.is_floating_point()
    )
    PROCESS.observer = recorder
    try:
        with torch.no_grad(), explained(model, inputs, recorder):
            steps(twin, placed, recorder)
            recorder.close_interval()
    finally:
        PROCESS.observer = None
    return recorder, weight_bytes


def _hook(twin: nn.Module, groups: list[tuple[Atom, ...]], recorder: Recorder) -> None:
    """As accelerate would: every atom's module gets its inputs on its own device, the root returns on the inputs'."""
    skipped = skip_keys(twin)
    for label, group in enumerate(groups):
        for atom in group:
            if atom.is_module:
                module = twin.get_submodule(atom.name)
                module.register_forward_pre_hook(_arrival(module, label, skipped, recorder), with_kwargs=True)
                module.register_forward_hook(lambda *_: recorder.leave(), always_call=True)
    home = torch.device("vgpu", INPUTS_LABEL)

    def bring_results(module: nn.Module, args: Any, output: Any) -> Any:
        recorder.arriving = "results"
        moved = relocate(output, lambda tensor: tensor.to(home))
        recorder.arriving = ""
        return moved

    twin.register_forward_hook(bring_results)


def _arrival(module: nn.Module, label: int, skipped: frozenset[str], recorder: Recorder) -> Any:
    device = torch.device("vgpu", label)
    positions = list(inspect.signature(module.forward).parameters)

    def bring(name: str, value: Any) -> Any:
        recorder.arriving = name
        moved = relocate(value, lambda tensor: tensor.to(device))
        recorder.arriving = ""
        return moved

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder.enter(label)
        moved = tuple(bring(positions[min(i, len(positions) - 1)], value) for i, value in enumerate(args))
        return moved, {name: value if name in skipped else bring(name, value) for name, value in kwargs.items()}

    return hook


def _names(group: tuple[Atom, ...]) -> tuple[str, ...]:
    return tuple(atom.name for atom in group) or ("the inputs",)
