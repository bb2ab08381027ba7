"""Files that commands write: refused before any work is done, replaced whole."""

from __future__ import annotations

from pathlib import Path

from planner.errors import ConstraintError, SourceError
from planner.textfile import write_atomically


def check_output(path: Path | None, *, force: bool) -> None:
    """Say what is wrong with a file to write before any work is done.

    Raises: ConstraintError when it is a folder, exists without `force`, or would be in no folder; SourceError when its
    path cannot be looked up.
    """
    if path is None:
        return
    try:
        exists = path.exists()
    except OSError as problem:
        raise SourceError(f"{path} cannot be written: {problem.strerror}") from problem
    if exists and path.is_dir():
        raise ConstraintError(f"{path} is a folder: name a file in it")
    if exists and not force:
        raise ConstraintError(f"{path} exists: choose another file, or overwrite it with --force")
    if not path.parent.is_dir():
        raise ConstraintError(f"{path.parent} is no folder: create it before writing {path.name} there")


def write_output(text: str, path: Path) -> None:
    """Replace the file by `text`.

    Raises: SourceError when the disk or the folder refuses.
    """
    try:
        write_atomically(path, text)
    except OSError as problem:
        raise SourceError(f"{path} cannot be written: {problem.strerror}") from problem
