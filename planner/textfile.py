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

MAX_DEPTH = 64
"""Deepest nesting that is read; a plan has six levels. The C loader recurses on the C stack, so too deep is a crash."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _StrictLoader(_Loader):  # type: ignore[misc]
    """Safe YAML without keys given twice; what its events may be is checked before."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    "while reading a mapping", node.start_mark, "a key is neither text nor number", key_node.start_mark
                )
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
    return parse_mapping(read_text(path, what, error), f"{what} {path}", error)


def read_text(path: Path, what: str, error: type[PlannerError]) -> str:
    """The text of a file of at most `MAX_BYTES`.

    Raises: `error` when it is missing, too large or no text.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{what} {path} is {path.stat().st_size} bytes: at most {MAX_BYTES} are read")
        with path.open("rb") as stream:
            # A device or a pipe says nothing of its length.
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise error(f"{what} {path} has no end: at most {MAX_BYTES} bytes are read")
        return content.decode("utf-8")
    except OSError as problem:
        raise error(f"{what} {path} cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{what} {path} is not text: {problem}") from problem


def parse_mapping(text: str, what: str, error: type[PlannerError]) -> dict[str, Any]:
    """The mapping that `text` holds as YAML (JSON included)."""
    try:
        _check_events(text)
        content = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as problem:
        said = " ".join(str(problem).split()).replace(' in "<unicode string>",', " at")
        raise error(f"{what} is not valid YAML: {said}") from problem
    if not isinstance(content, dict):
        raise error(f"{what} holds {type(content).__name__}, not a mapping of keys to values")
    return content


def _check_events(text: str) -> None:
    """Refuse aliases (they can grow a file a billionfold), tags and deep nesting, before anything is composed.

    The C loader composes in C, out of reach of a Python override.
    """
    depth = 0
    events: Any = yaml.parse(text, Loader=_Loader)
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        complaint = None
        if isinstance(event, yaml.AliasEvent):
            complaint = f"the alias *{event.anchor} is not allowed here"
        elif getattr(event, "tag", None):
            complaint = f"the tag {event.tag} is not allowed here"
        elif depth > MAX_DEPTH:
            complaint = f"nested deeper than {MAX_DEPTH} levels"
        if complaint:
            raise yaml.MarkedYAMLError(problem=complaint, problem_mark=event.start_mark)


def dump_mapping(content: dict[str, Any]) -> str:
    """YAML text of `content` in its own key order; equal content gives equal text."""
    return str(yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; a failure leaves what was there.

    What is no regular file, such as a device or a pipe, is written to: it must not be replaced by a file.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
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
