"""Operands that meet on different devices: what a run on virtual GPUs saw, with the line of model code it saw it at."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import accelerate
import torch

_OUTSIDE = tuple(str(Path(package.__file__).parent) for package in (torch, accelerate) if package.__file__)
_OURS = str(Path(__file__).parent)
_OUR_FOLDER = f"{Path(__file__).parents[1]}/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A line of code: file, number, function and text."""

    file: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """One operation at one line that got operands from several devices.

    `operands` are argument names, `devices` and `modules` go with them: where each operand lay, and the module it
    belongs to or was last computed by. `kind` is "devices", or "host" when an operand was left on the CPU, which no
    placement can mend. `within` is the module whose code ran, and `tensors` are the names of the operands that are
    parameters or buffers, empty for all others; a watch that keeps no names leaves both out.
    """

    op: str
    place: Place
    operands: tuple[str, ...]
    devices: tuple[str, ...]
    modules: tuple[str, ...]
    phase: str
    within: str = ""
    tensors: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file of the line."""
        return self.place.file

    @property
    def line(self) -> int:
        """Its number."""
        return self.place.line

    @property
    def kind(self) -> str:
        """ "devices" or "host"."""
        return "host" if "cpu" in self.devices else "devices"

    def __str__(self) -> str:
        met = ", ".join(
            f"{name} of {module} on {device}"
            for name, module, device in zip(self.operands, self.modules, self.devices, strict=True)
        )
        return f"{self.op} at {self.place} ({self.phase}): {met}"


def calling_place() -> Place:
    """The innermost line of model code that is running: outside torch, accelerate and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        if _is_model_code(frame):
            break
        frame = frame.f_back
    assert frame is not None
    return _place(frame, frame.f_lineno)


def place_of(error: BaseException) -> Place | None:
    """The innermost line of model code that an exception came through; None when it came through none."""
    place, trace = None, error.__traceback__
    while trace is not None:
        if _is_model_code(trace.tb_frame):
            place = _place(trace.tb_frame, trace.tb_lineno)
        trace = trace.tb_next
    return place


def _is_model_code(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith((*_OUTSIDE, _OURS, "<"))


def _place(frame: FrameType, line: int) -> Place:
    file = frame.f_code.co_filename
    return Place(
        file=_short(file), line=line, function=frame.f_code.co_name, text=linecache.getline(file, line).strip()
    )


def unique(mismatches: Sequence[Mismatch]) -> tuple[Mismatch, ...]:
    """One mismatch per cause: the first of each operation, line and set of devices."""
    found: dict[tuple[str, str, int, frozenset[str]], Mismatch] = {}
    for mismatch in mismatches:
        found.setdefault((mismatch.op, mismatch.file, mismatch.line, frozenset(mismatch.devices)), mismatch)
    return tuple(found.values())


def _short(file: str) -> str:
    """The path from `site-packages` or from our own packages' folder on, which is the same on every machine."""
    return file.rpartition("site-packages/")[2].removeprefix(_OUR_FOLDER)
