"""Known models by name, offline: one data file each with the facts of its config and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from planner.textfile import read_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One data file: names as on the hub in lower case, the config's facts, and their source."""

    name: str
    organisation: str
    aliases: tuple[str, ...]
    dtype: str
    parameters: int
    source: str
    config: Mapping[str, Any]


def catalogue_names() -> dict[str, str]:
    """Every name, aliases included, to the stem of its data file; sorted."""
    return dict(sorted(_names().items()))


def lookup(name: str) -> CatalogueEntry:
    """The entry of a hub name, in any case, with or without its organisation.

    Raises: SourceError offering near matches for an unknown name.
    """
    organisation, _, short = name.strip().lower().rpartition("/")
    stem = _names().get(short)
    entry = _read(stem) if stem else None
    if entry is None or organisation not in ("", entry.organisation):
        near = get_close_matches(short, _names(), n=3, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else "See `plan-devices models` for all names."
        raise SourceError(
            f"{name!r} is neither a folder here nor a model in the catalogue. {hint} "
            "A model of the hub is named organisation/name."
        )
    return entry


@cache
def _names() -> dict[str, str]:
    names: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        entry = _read(path.stem)
        names |= dict.fromkeys((entry.name, *entry.aliases), path.stem)
    return names


@cache
def _read(stem: str) -> CatalogueEntry:
    content = read_mapping(Path(__file__).with_name(f"{stem}.yaml"), "catalogue file", SourceError)
    return CatalogueEntry(name=stem, aliases=tuple(content.pop("aliases", ())), **content)
