"""Anyone's device map: a file, or a mapping from Python, read with suspicion into module -> GPU index, `cpu` or `disk`.

Torch-free: a torch device is known by its text, `cuda:1`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.diagnosis.diagnosis import OFFLOADED, Place
from planner.errors import PlanMismatchError, SourceError
from planner.machine import Machine
from planner.paths import owner
from planner.textfile import parse_mapping, read_text

MAX_INDEX = 127
"""Device indices are 8-bit signed in torch."""

MAX_ENTRIES = 100_000
"""More than any model has tensors."""

_NAMED = re.compile(r"(?:(?:cuda|vgpu|xpu|npu|hip)(?::([0-9]{1,3}))?|([0-9]{1,3}))")

_EXAMPLE = "Write module: device, such as model.visual: 0."


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenMap:
    """A device map as it was given: `placement` in one spelling, `written` as its author spelled it."""

    origin: str
    placement: Mapping[str, Place]
    written: Mapping[str, Any]

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPU indices that it names, in its own order."""
        return tuple(dict.fromkeys(place for place in self.placement.values() if isinstance(place, int)))

    def place(self, name: str) -> Place | None:
        """Where a module or tensor is put; None where no entry says."""
        entry = owner(name, self.placement)
        return self.placement[entry] if entry is not None else None

    @property
    def offloaded(self) -> dict[str, Place]:
        """Entries that keep weights on the host or disk."""
        return {name: place for name, place in self.placement.items() if place in OFFLOADED}

    @property
    def fetched(self) -> dict[str, Place]:
        """Those whose weights come for the time their module runs: where no GPU is named, the host runs its own."""
        away = OFFLOADED if self.gpus else ("disk",)
        return {name: place for name, place in self.placement.items() if place in away}


def read_map_file(path: Path) -> GivenMap:
    """The device map in a JSON or YAML file: the mapping itself, or what stands under its key `device_map`.

    Raises: SourceError when the file is missing, hostile, too large, or holds no device map.
    """
    what = f"device map {path}"
    text = read_text(path, "device map", SourceError)
    if not text.strip():
        raise SourceError(f"{what} is empty. {_EXAMPLE}")
    content = _parsed(text, what)
    if "device_map" in content and not _is_device(content["device_map"]):
        content, what = content["device_map"], f"{what}, device_map,"
        if not isinstance(content, dict):
            raise SourceError(f"{what} is {_shown(content)}: a map says a device for each module. {_EXAMPLE}")
    return replace(given_map(content, what, SourceError), origin=path.name)


def given_map(
    entries: Mapping[str, Any],
    origin: str = "the device map",
    error: type[SourceError] | type[PlanMismatchError] = PlanMismatchError,
) -> GivenMap:
    """The map that `entries` mean.

    Raises: `error` naming the entry when a key is no module's name or a value no device; for no entry, or too many.
    """
    if not entries:
        raise error(f"{origin} has no entries. {_EXAMPLE}")
    if len(entries) > MAX_ENTRIES:
        raise error(f"{origin} has {len(entries)} entries: at most {MAX_ENTRIES} are read, and no model has so many")
    placement: dict[str, Place] = {}
    for name, value in entries.items():
        if not isinstance(name, str):
            hint = f" It looks reversed: write {value}: {name}." if isinstance(value, str) else ""
            raise error(f"{origin} has the key {name!r}: keys are module names, values devices.{hint}")
        if not name.isprintable():
            raise error(f"{origin} has the key {name!r}: no module's name holds control characters. Remove that entry.")
        place = _place(value)
        if place is None:
            raise error(
                f"{origin} says {_shown(name)}: {_shown(value)}. A device is a GPU's index of 0 to {MAX_INDEX}, "
                f"cuda:INDEX, cpu or disk.{_hint(name, value)}"
            )
        placement[name] = place
    return GivenMap(origin=origin, placement=placement, written=dict(entries))


def refuse_unknown_devices(given: GivenMap, machine: Machine) -> None:
    """Raise PlanMismatchError when the map names a GPU that the machine does not have."""
    known = [device.index for device in machine.devices]
    wrong = [
        f"{name or repr('')}: {place}"
        for name, place in given.placement.items()
        if isinstance(place, int) and place not in known
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PlanMismatchError(
            f"{given.origin} says {', '.join(wrong[:3])}{more}; this machine has the GPUs "
            f"{', '.join(map(str, known))}. Describe the machine that the map is for with --gpus, or change the map."
        )


def _parsed(text: str, what: str) -> dict[str, Any]:
    """JSON as JSON, because its tabs are no YAML; everything else as YAML, which has mappings in braces too."""
    if not text.lstrip().startswith("{"):
        return parse_mapping(text, what, SourceError)
    try:
        return dict(json.loads(text, object_pairs_hook=_unique_keys))
    except json.JSONDecodeError as problem:
        try:
            return parse_mapping(text, what, SourceError)
        except SourceError:
            raise SourceError(f"{what} is neither JSON nor YAML: {problem}") from problem
    except (ValueError, RecursionError) as problem:
        raise SourceError(f"{what} is not valid JSON: {problem}") from problem


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} is given twice")
        content[key] = value
    return content


def _place(value: Any) -> Place | None:
    if isinstance(value, bool):
        return None
    text = str(value)
    if text in OFFLOADED:
        return text
    match = _NAMED.fullmatch(text)
    if match is None:
        return None
    index = int(match[1] or match[2] or 0)
    return index if index <= MAX_INDEX else None


def _is_device(value: Any) -> bool:
    """Whether the key `device_map` is a module's name after all."""
    return _place(value) is not None


def _hint(name: str, value: Any) -> str:
    """What was probably meant by an entry that is none."""
    if isinstance(value, dict) and value:
        inner = next(iter(value))
        return f" A map is flat: write {name + '.' if name else ''}{inner}: DEVICE."
    if _is_device(name) and isinstance(value, str):
        return f" It looks reversed: write {_shown(value)}: {name}."
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
