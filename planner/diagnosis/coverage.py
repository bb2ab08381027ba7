"""What a device map says about a model's names: tensors without an entry, entries without effect, ties apart.

Everything here follows from names and sizes; nothing is run. The rules are those of transformers' loader and of
accelerate's dispatch: every tensor of the state dict needs an entry, hooks go on modules only, the root's own tensors
follow the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from planner.diagnosis.diagnosis import OFFLOADED, Finding, Place
from planner.diagnosis.map_file import GivenMap
from planner.paths import collapse, contains, owner
from planner.report import short_names

SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """What of a model a map can name: modules, and tensors with their bytes under their first name.

    `non_persistent` buffers are in no checkpoint; `ties` are names of one parameter each.
    """

    modules: frozenset[str]
    parameters: Mapping[str, int]
    buffers: Mapping[str, int]
    non_persistent: frozenset[str] = frozenset()
    ties: tuple[tuple[str, ...], ...] = ()

    @property
    def tensors(self) -> dict[str, int]:
        """Parameters and buffers together; further names of a tied parameter have no bytes of their own."""
        further = {name: 0 for tie in self.ties for name in tie if name not in self.parameters}
        return {**self.parameters, **further, **self.buffers}

    def bytes_under(self, path: str) -> int:
        """Bytes of all tensors in a module, or of one tensor."""
        return sum(num_bytes for name, num_bytes in self.tensors.items() if contains(path, name))


def uncovered(given: GivenMap, names: ModelNames) -> tuple[str, ...]:
    """Tensors that the map gives no device."""
    return tuple(name for name in names.tensors if owner(name, given.placement) is None)


def coverage_findings(given: GivenMap, names: ModelNames, home: int) -> Iterator[Finding]:
    """Everything that the names alone show; `home` is the GPU of inputs and results."""
    yield from _without_entry(given, names)
    yield from _stale(given, names)
    yield from _text_prefixes(given, names)
    yield from _shadowed(given, names)
    yield from _ignored(given, names, home)
    yield from _ties_apart(given, names)


def renames(given: GivenMap, names: ModelNames) -> dict[str, str]:
    """For entries that match nothing, the module each most likely means, where that is one and still free."""
    free = {path for path in (*names.modules, *names.tensors) if path and path not in given.placement}
    found = {stale: _likeliest(stale, free) for stale in stale_entries(given, names)}
    wanted = Counter(found.values())
    return {stale: path for stale, path in found.items() if path and wanted[path] == 1}


def stale_entries(given: GivenMap, names: ModelNames) -> list[str]:
    """Entries that are no module's and no tensor's name."""
    known = names.modules | names.tensors.keys()
    return [name for name in given.placement if name not in known]


def stranded(placement: Mapping[str, Place], names: ModelNames) -> tuple[str, ...]:
    """Bare tensors that stay on the host or disk for good: no hook of theirs or around them brings them to a GPU.

    The root's own tensors are moved by its hook; where no entry names a GPU, everything runs on the host.
    """
    if not any(isinstance(place, int) for place in placement.values()):
        return ()
    hooked = [name for name in placement if name in names.modules]
    bare = [name for name, place in placement.items() if place in OFFLOADED and name not in names.modules]
    return tuple(name for name in bare if name in names.tensors and "." in name and owner(name, hooked) is None)


def _without_entry(given: GivenMap, names: ModelNames) -> Iterator[Finding]:
    missing = uncovered(given, names)
    refused = [name for name in missing if name not in names.non_persistent]
    if refused:
        modules = _fewest(refused, names)
        yield Finding(
            severity="will fail",
            hazard="bareparam",
            title=f"{_counted(len(refused), 'tensor has', 'tensors have')} no entry",
            evidence=(
                _listed(modules),
                "accelerate refuses such a map: ValueError, does not give any device for the following parameters",
            ),
            fix="Add an entry for each, or for a module around it; bare tensors need their own.",
            modules=tuple(modules),
        )
    tables = [name for name in missing if name in names.non_persistent]
    if tables:
        modules = _fewest(tables, names)
        yield Finding(
            severity="may fail",
            hazard="rope",
            title=f"{_counted(len(tables), 'non-persistent buffer has', 'non-persistent buffers have')} no entry",
            evidence=(
                _listed(modules),
                "such tables stay on the CPU; no checkpoint holds them, so no list of weights reminds one of them",
            ),
            fix=f"Add {', '.join(modules[:SHOWN])} on the device of the layers that read it.",
            modules=tuple(modules),
        )


def _stale(given: GivenMap, names: ModelNames) -> Iterator[Finding]:
    stale = stale_entries(given, names)
    if not stale:
        return
    offered = renames(given, names)
    evidence = [_listed(stale)]
    evidence += [f"{old} is probably {new}" for old, new in list(_prefix_changes(offered).items())[:SHOWN]]
    yield Finding(
        # Where every tensor has its entry, accelerate warns and goes on.
        severity="may fail" if uncovered(given, names) else "wasteful",
        hazard="bareparam",
        title=f"{len(stale)} of {len(given.placement)} entries match nothing in this model",
        evidence=tuple(evidence),
        fix="Rename them as shown." if offered else "Remove them: they are of another model or version.",
        modules=tuple(stale),
    )


def _text_prefixes(given: GivenMap, names: ModelNames) -> Iterator[Finding]:
    """transformers' loader compares names as text: `layers.1` also takes `layers.10`, if nothing longer does."""
    caught: dict[str, list[str]] = {}
    for name in uncovered(given, names):
        entry = max((e for e in given.placement if e and name.startswith(e)), key=len, default=None)
        if entry is not None:
            caught.setdefault(entry, []).append(name)
    for entry, tensors in caught.items():
        yield Finding(
            severity="may fail",
            hazard="bareparam",
            title=f"the entry {entry} takes tensors of other modules by its text alone",
            evidence=(f"{_listed(_parents(tensors))} would be loaded where {entry} is",),
            fix="Give each module its own entry.",
            place=entry,
            modules=(entry,),
        )


def _shadowed(given: GivenMap, names: ModelNames) -> Iterator[Finding]:
    """Entries whose tensors all have finer entries: what they say about weights is never read."""
    used = {owner(name, given.placement) for name in names.tensors}
    for entry in given.placement:
        finer = [other for other in given.placement if other != entry and contains(entry, other)]
        elsewhere = any(given.placement[other] != given.placement[entry] for other in finer)
        if entry not in used and elsewhere and names.bytes_under(entry):
            yield Finding(
                severity="wasteful",
                hazard="bareparam",
                title=f"the entry {entry or '(the root)'} is shadowed by finer ones",
                evidence=(f"every tensor in it has an entry of its own: {_listed(finer)}",),
                fix="Remove it; where only a hook is wanted, say so in a comment.",
                place=entry,
            )


def _ignored(given: GivenMap, names: ModelNames, home: int) -> Iterator[Finding]:
    """Entries of bare tensors that dispatch overrules: hooks go on modules, and take their own tensors with them."""
    for entry, place in given.placement.items():
        if entry not in names.tensors or entry in names.modules:
            continue
        parent = entry.rpartition(".")[0]
        hooked = owner(parent, [name for name in given.placement if name in names.modules])
        goes_to = given.placement[hooked] if hooked is not None else home
        if goes_to != place and (hooked is not None or not parent):
            around = f"the entry {hooked or '(the root)'}" if hooked is not None else "the root's own tensors"
            yield Finding(
                severity="wasteful",
                hazard="bareparam",
                title=f"the entry of the tensor {entry} is ignored",
                evidence=(f"a hook on {around} takes it to {_named(goes_to)}, not {_named(place)}",),
                fix=f"Say {entry}: {goes_to}, or move the module that holds it.",
                place=f"{entry}: {place}",
                modules=(entry,),
            )


def _ties_apart(given: GivenMap, names: ModelNames) -> Iterator[Finding]:
    for tie in names.ties:
        places = {name: given.placement[entry] for name in tie if (entry := owner(name, given.placement)) is not None}
        if len(set(places.values())) < 2:
            continue
        yield Finding(
            severity="may fail",
            hazard="tied",
            title=f"{' and '.join(tie)} are one weight on {len(set(places.values()))} devices",
            evidence=(
                ", ".join(f"{name} on {_named(place)}" for name, place in places.items()),
                "accelerate ties them again once they are placed: the weight ends on one device, and what else uses it "
                "gets its inputs on another",
            ),
            fix=f"Put {tie[-1].rpartition('.')[0]} where {tie[0].rpartition('.')[0]} is.",
            modules=tuple(name.rpartition(".")[0] for name in tie),
        )


def _likeliest(stale: str, paths: set[str]) -> str:
    """The path that shares the longest tail with `stale`, then the most segments; "" when several do, or none."""
    segments = stale.split(".")
    scored: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        other = path.split(".")
        tail = _shared_tail(segments, other)
        if tail:
            common = sum((Counter(segments) & Counter(other)).values())
            scored.setdefault((common, tail), []).append(path)
    if not scored:
        return ""
    best = scored[max(scored)]
    shortest = [path for path in best if path.count(".") == min(p.count(".") for p in best)]
    return shortest[0] if len(shortest) == 1 else ""


def _shared_tail(left: Sequence[str], right: Sequence[str]) -> int:
    count = 0
    for one, other in zip(reversed(left), reversed(right), strict=False):
        if one != other:
            break
        count += 1
    return count


def _prefix_changes(offered: Mapping[str, str]) -> dict[str, str]:
    """The renames with what their ends share cut off, so that forty layers are one line."""
    changes: dict[str, str] = {}
    for old, new in offered.items():
        tail = _shared_tail(old.split("."), new.split("."))
        short = [".".join(name.split(".")[:-tail]) for name in (old, new)]
        kept = old if not short[0] else f"{short[0]}.*"
        changes.setdefault(kept, new if not short[0] else f"{short[1]}.*" if short[1] else "the same without it")
    return changes


def _fewest(tensors: Sequence[str], names: ModelNames) -> list[str]:
    """The fewest modules that hold these tensors and no others."""
    chosen = set(tensors)
    return [module for module, inside in collapse({name: name in chosen for name in names.tensors}).items() if inside]


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _parents(tensors: Sequence[str]) -> list[str]:
    """The modules right around tensors; a tensor of the root stands for itself."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in tensors))


def _listed(names: Sequence[str]) -> str:
    short = short_names(names)
    more = f" and {len(short) - SHOWN} more" if len(short) > SHOWN else ""
    return ", ".join(name or "(the root)" for name in short[:SHOWN]) + more


def _named(place: Place) -> str:
    return f"cuda:{place}" if isinstance(place, int) else place
