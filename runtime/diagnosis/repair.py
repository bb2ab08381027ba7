"""The smallest change of a device map that makes it run: what a trace shows to belong together goes together.

Of a group that a failure touches, the part with fewest bytes moves to the rest. The result is run; what still fails
touches further groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

from planner.diagnosis.coverage import ModelNames, renames, stale_entries
from planner.diagnosis.diagnosis import Move, Place, Repair
from planner.diagnosis.map_file import GivenMap
from planner.paths import collapse, contains, owner
from runtime.diagnosis.classify import involved
from runtime.diagnosis.map_run import MapRun
from runtime.mismatch import Mismatch
from runtime.recorder import INPUTS_LABEL
from runtime.trace import Trace

MAX_ROUNDS = 6

Run = Callable[[Mapping[str, Place]], MapRun]
"""Runs a map and says what it showed."""


def completed(given: GivenMap, names: ModelNames, atoms: Sequence[str]) -> dict[str, Place]:
    """The map with stale entries renamed or dropped, and an entry for what has none: that of the module before it."""
    renamed, stale = renames(given, names), set(stale_entries(given, names))
    entries = {
        renamed.get(name, name): place
        for name, place in given.placement.items()
        if name not in stale or name in renamed
    }
    entries = entries or {atoms[0]: next(iter(given.placement.values()))}
    missing = [atom for atom in atoms if _is_uncovered(atom, names, entries)]
    before: Place | None = None
    added: dict[str, Place] = {}
    first = next(
        (entries[entry] for atom in atoms if (entry := owner(atom, entries)) is not None), next(iter(entries.values()))
    )
    for atom in atoms:
        if atom in missing:
            added[atom] = before if before is not None else first
        else:
            entry = owner(atom, entries) or next((name for name in entries if contains(atom, name)), None)
            before = entries[entry] if entry is not None else before
    return {**entries, **_collapsed_beside(added, entries, atoms)}


def repair(
    given: GivenMap, names: ModelNames, trace: Trace, run: Run, *, home: int, onto_gpu: Collection[str] = ()
) -> Repair:
    """The repaired map, proven by `run`, or the best that could be done.

    `home` is the GPU of inputs and results; entries in `onto_gpu` may not stay on the host.
    """
    atoms = [atom.name for group in trace.groups for atom in group]
    order = _in_order(atoms, names)
    entries = {n: home if n in onto_gpu else place for n, place in completed(given, names, order).items()}
    groups = _Groups(trace, names, home)
    whole: dict[str, Place] = {}
    together: dict[int, Place] = {}
    current, outcome = entries, run(entries)
    for _ in range(MAX_ROUNDS):
        if outcome.ok:
            break
        idle = _weightless(outcome.mismatches, current, names)
        inner = _split_parts(outcome.mismatches, current, order) if not idle else []
        labels = groups.touched(outcome.mismatches, current) if not idle and not inner else []
        if not idle and not inner and not labels:
            labels = groups.split(current)
        if not idle and not inner and not labels:
            break
        entries = {name: place for name, place in entries.items() if name not in idle}
        whole |= {module: _heaviest(_places(module, names, entries)) for module in inner}
        together |= {label: groups.target(label, entries) for label in labels}
        current = _rewritten(_made_whole(entries, whole), groups.placed(together), order)
        outcome = run(current)
    moves = _moves(given, entries, current, order, names)
    return Repair(device_map=current, moves=moves, proven=outcome.ok, reasons=groups.reasons(together))


def _weightless(mismatches: Iterable[Mismatch], entries: Mapping[str, Place], names: ModelNames) -> set[str]:
    """Entries that move data and hold none, such as an activation's, of modules that a mismatch names.

    Without an entry such a module runs where its input is.
    """
    named = {name for mismatch in mismatches for name in involved(mismatch)}
    return {name for name in named if name in entries and not any(contains(name, t) for t in names.tensors)}


def _split_parts(mismatches: Iterable[Mismatch], entries: Mapping[str, Place], atoms: Sequence[str]) -> list[str]:
    """The smallest modules inside atoms around the code that failed which the map cuts."""
    found: dict[str, None] = {}
    for mismatch in mismatches:
        atom = owner(mismatch.within, atoms)
        module = mismatch.within
        while atom is not None and module != atom and not _is_cut(module, entries):
            module = module.rpartition(".")[0]
        if atom is not None and module != atom:
            found.setdefault(module)
    return list(found)


def _is_cut(module: str, entries: Mapping[str, Place]) -> bool:
    entry = owner(module, entries)
    inside = {place for name, place in entries.items() if contains(module, name)}
    return len(inside | ({entries[entry]} if entry is not None else set())) > 1


def _made_whole(entries: Mapping[str, Place], modules: Mapping[str, Place]) -> dict[str, Place]:
    """The map with one entry for each of `modules` in the stead of all inside it."""
    result: dict[str, Place] = {}
    for name, place in entries.items():
        around = next((module for module in modules if contains(module, name)), None)
        if around is None:
            result[name] = place
        else:
            result.setdefault(around, modules[around])
    return result


def _places(module: str, names: ModelNames, entries: Mapping[str, Place]) -> Counter[Place]:
    """Bytes inside a module by the device that the map gives them; a tensor of no bytes still counts."""
    found: Counter[Place] = Counter()
    for name, num_bytes in names.tensors.items():
        if contains(module, name) and (entry := owner(name, entries)) is not None:
            found[entries[entry]] += max(num_bytes, 1)
    return found


def _heaviest(places: Counter[Place]) -> Place:
    """Where most of it is; GPUs go before the host."""
    return max(places, key=lambda place: (isinstance(place, int), places[place]))


@dataclass(slots=True)
class _Groups:
    """What must share a device, by number: what the trace merged, and groups that hold names of one tied weight."""

    trace: Trace
    names: ModelNames
    home: int
    groups: list[tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        together: nx.Graph[int] = nx.Graph()
        together.add_nodes_from(range(len(self.trace.groups)))
        label_of = {atom.name: label for label, group in enumerate(self.trace.groups) for atom in group}
        for tie in self.names.ties:
            labels = [label_of[atom] for name in tie if (atom := owner(name, label_of)) is not None]
            nx.add_path(together, labels)
        classes = sorted(nx.connected_components(together), key=min)
        self.groups = [
            tuple(atom.name for label in sorted(labels) for atom in self.trace.groups[label]) for labels in classes
        ]

    def members(self, label: int) -> tuple[str, ...]:
        return self.groups[label]

    def weights(self, label: int, entries: Mapping[str, Place]) -> Counter[Place]:
        """Bytes of a group by the device that the map gives them."""
        parts = [_places(member, self.names, entries) for member in self.members(label)]
        return sum(parts, Counter())

    def target(self, label: int, entries: Mapping[str, Place]) -> Place:
        """Where most of the group is; what belongs with the inputs goes to them."""
        return self.home if label == INPUTS_LABEL else _heaviest(self.weights(label, entries))

    def split(self, entries: Mapping[str, Place]) -> list[int]:
        """Groups on several devices, or on another than their inputs' where they belong with those."""
        found = []
        for label in range(len(self.groups)):
            places = set(self.weights(label, entries)) | ({self.home} if label == INPUTS_LABEL else set())
            if self.members(label) and len(places) > 1:
                found.append(label)
        return found

    def touched(self, mismatches: Iterable[Mismatch], entries: Mapping[str, Place]) -> list[int]:
        """Split groups with a module that a mismatch names."""
        named = {name for mismatch in mismatches for name in involved(mismatch)}
        return [
            label
            for label in self.split(entries)
            if any(contains(atom, name) or contains(name, atom) for atom in self.members(label) for name in named)
        ]

    def placed(self, wanted: Mapping[int, Place]) -> dict[str, Place]:
        """Atoms of the groups that are brought together, and where to."""
        return {name: place for label, place in wanted.items() for name in self.members(label)}

    def reasons(self, wanted: Mapping[int, Place]) -> tuple[str, ...]:
        """The operations that showed these groups to belong together."""
        members = {name for label in wanted for name in self.members(label)}
        causes = [
            merge.cause for merge in self.trace.merges if any(members.intersection(group) for group in merge.groups)
        ]
        return tuple(dict.fromkeys(f"{cause.op} at {cause.place}" for cause in causes))


def _rewritten(entries: Mapping[str, Place], wanted: Mapping[str, Place], atoms: Sequence[str]) -> dict[str, Place]:
    """The map with the `wanted` atoms where they are wanted; entries that hold none of them stay as they are.

    An entry that holds some is spelled out, in the fewest modules that say it.
    """
    moved = {atom for atom, place in wanted.items() if not _is_at(atom, place, entries)}
    keys: dict[str, tuple[str, Place | None]] = {}
    for atom in atoms:
        entry = owner(atom, entries)
        place = wanted[atom] if atom in moved else entries[entry] if entry is not None else None
        keys[atom] = (entry if entry is not None else atom, place)
    spelled: dict[str, list[tuple[str, Place]]] = {}
    broken = {keys[atom][0] for atom in moved}
    for module, (entry, place) in collapse(keys).items():
        if entry in broken and place is not None:
            spelled.setdefault(entry, []).append((module, place))
    result: dict[str, Place] = {}
    for name, place in entries.items():
        inside = next((atom for atom in moved if contains(atom, name)), None)
        if name in broken:
            result.update(spelled.pop(name, []))
        elif inside is not None:
            result.setdefault(inside, wanted[inside])
        else:
            result[name] = place
    result.update(pair for pairs in spelled.values() for pair in pairs)
    return result


def _is_at(atom: str, place: Place, entries: Mapping[str, Place]) -> bool:
    """Whether an atom and every entry inside it are at `place` already."""
    entry = owner(atom, entries)
    inside = [other for name, other in entries.items() if contains(atom, name)]
    return (entry is not None and entries[entry] == place or bool(inside)) and all(other == place for other in inside)


def _is_uncovered(atom: str, names: ModelNames, entries: Mapping[str, Place]) -> bool:
    inside = [name for name in names.tensors if contains(atom, name)]
    return any(owner(name, entries) is None for name in inside)


def _collapsed_beside(
    added: Mapping[str, Place], entries: Mapping[str, Place], atoms: Sequence[str]
) -> dict[str, Place]:
    """New entries in the fewest modules, none of which swallows what has an entry already."""
    keys: dict[str, tuple[bool, Place | None]] = {atom: (atom in added, added.get(atom)) for atom in atoms}
    return {module: place for module, (is_new, place) in collapse(keys).items() if is_new and place is not None}


def _in_order(atoms: Iterable[str], names: ModelNames) -> list[str]:
    """Atoms in the order of the model's tensors."""
    position = {name: index for index, name in enumerate(names.tensors)}
    known = list(atoms)
    first = {atom: len(position) for atom in known}
    for name, index in position.items():
        atom = owner(name, known)
        if atom is not None:
            first[atom] = min(first[atom], index)
    return sorted(known, key=first.__getitem__)


def _moves(
    given: GivenMap, entries: Mapping[str, Place], after: Mapping[str, Place], atoms: Sequence[str], names: ModelNames
) -> tuple[Move, ...]:
    """What changed, atom by atom; an entry that was dropped or renamed is a move without bytes."""
    found: list[Move] = []
    for atom in atoms:
        tensors = [(name, size) for name, size in names.tensors.items() if contains(atom, name)]
        changed = [(name, size) for name, size in tensors if _place_of(name, given.placement) != _place_of(name, after)]
        if changed:
            name = changed[0][0]
            found.append(
                Move(
                    module=atom,
                    source=_place_of(name, given.placement),
                    target=_place_of(name, after),
                    num_bytes=sum(size for name, size in changed if _place_of(name, given.placement) is not None),
                )
            )
    stale = set(stale_entries(given, names))
    gone = [name for name in given.placement if name not in after and (name in stale or name not in entries)]
    return (*found, *(Move(module=name, source=given.placement[name], target=None) for name in gone))


def _place_of(name: str, entries: Mapping[str, Place]) -> Place | None:
    entry = owner(name, entries)
    return entries[entry] if entry is not None else None
