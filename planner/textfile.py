"""YAML files read with suspicion and written whole: size limit, no aliases, no repeated keys, atomic replace."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from planner.errors import PlannerError

MAX_BYTES = 16 * 2**20
"""Largest plan or machine file that is read: a hundred times the largest plan seen."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _StrictLoader(_Loader):  # type: ignore[misc]
    """Safe YAML without aliases (they can grow a file a billionfold) and without keys given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError("aliases are not allowed here", event.start_mark, str(event.anchor), None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    "while reading a mapping", node.start_mark, f"{key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _PlainDumper(_Dumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_mapping(path: Path, what: str, error: type[PlannerError]) -> dict[str, Any]:
    """The mapping that the YAML or JSON file `path` holds.

    Raises: `error`, naming the file, the line and the rule, when it is missing, too large, not YAML or no mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{what} {path} is {path.stat().st_size} bytes: at most {MAX_BYTES} are read")
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"{what} {path} cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{what} {path} is not text: {problem}") from problem
    return parse_mapping(text, f"{what} {path}", error)


def parse_mapping(text: str, what: str, error: type[PlannerError]) -> dict[str, Any]:
    """The mapping that `text` holds as YAML (JSON included)."""
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as problem:
        raise error(f"{what} is not valid YAML: {' '.join(str(problem).split())}") from problem
    if not isinstance(content, dict):
        raise error(f"{what} holds {type(content).__name__}, not a mapping of keys to values")
    return content


def dump_mapping(content: dict[str, Any]) -> str:
    """YAML text of `content` in its own key order; equal content gives equal text."""
    return str(yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; a failure leaves what was there."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
