"""Module paths (FQNs), compared segment by segment, never as text.

`model.layers.1` contains `model.layers.1.w` and not `model.layers.10.w`; the empty path is the root and contains
everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Device = TypeVar("Device")


def contains(module: str, path: str) -> bool:
    """Whether `path` is `module` itself or lies inside it."""
    return module == "" or path == module or path.startswith(module + ".")


def owner(path: str, modules: Iterable[str]) -> str | None:
    """The longest of `modules` that contains `path`, or None when none does."""
    candidates = set(modules)
    segments = path.split(".")
    for length in range(len(segments), -1, -1):
        prefix = ".".join(segments[:length])
        if prefix in candidates:
            return prefix
    return None


def collapse(placement: Mapping[str, Device]) -> dict[str, Device]:
    """The shortest map that says the same: a parent stands for its children where all agree.

    Module lists (parents whose children are all numbers) stay spelled out, because a list is never called and
    readers count layers. Order follows `placement`.
    """
    return dict(_collapsed("", list(placement.items())))


def _collapsed(prefix: str, entries: list[tuple[str, Device]]) -> list[tuple[str, Device]]:
    devices = {device for _, device in entries}
    children: dict[str, list[tuple[str, Device]]] = {}
    for path, device in entries:
        children.setdefault(_child(prefix, path), []).append((path, device))
    is_list = all(child.rpartition(".")[2].isdigit() for child in children)
    if len(devices) == 1 and not (is_list and len(children) > 1):
        return [(prefix, entries[0][1])]
    if list(children) == [prefix]:
        return entries
    return [entry for child, inside in children.items() for entry in _collapsed(child, inside)]


def _child(prefix: str, path: str) -> str:
    if path == prefix:
        return path
    depth = prefix.count(".") + 2 if prefix else 1
    return ".".join(path.split(".")[:depth])
