"""Integers, booleans and numbers that follow from values nobody knows: each decided by a stated rule, and recorded.

The rules take an unknown number for an ordinary one: finite, different from zero and from every other number, neither
more nor less than any. Ranks are dealt out in turn, so that a router spreads tokens evenly over its experts. This file
makes host values; it does not know devices.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_OURS = str(Path(__file__).parent)
_OUTSIDE = (_OURS, str(Path(torch.__file__).parent), "<")
_ACCELERATE = "/accelerate/"
_HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One value decided by a rule: the operation, the value's shape, the rule, and the line of model code."""

    op: str
    shape: tuple[int, ...]
    rule: str
    place: str

    def __str__(self) -> str:
        return f"{self.op} {list(self.shape)}: {self.rule} ({self.place})"


class ShapeOnlyError(RuntimeError):
    """An operation that needs the values of tensors without bytes, or of which no shape is known: `.op`, `.place`."""

    def __init__(self, op: str, problem: str, advice: str) -> None:
        self.op = op
        self.place = model_line()
        super().__init__(f"{op} at {self.place}: {problem}. {advice}")


# What a constant rule says of results that are integers or booleans, by operation.
_ORDINARY: Mapping[str, tuple[int, str]] = {
    "eq": (0, "an unknown number equals no other: False"),
    "ne": (1, "an unknown number equals no other: True"),
    "lt": (0, "an unknown number is not less than another: False"),
    "le": (0, "an unknown number is not less than another: False"),
    "gt": (0, "an unknown number is not more than another: False"),
    "ge": (0, "an unknown number is not more than another: False"),
    "isin": (0, "an unknown number equals no other: False"),
    "isnan": (0, "an unknown number is finite: False"),
    "isinf": (0, "an unknown number is finite: False"),
    "isposinf": (0, "an unknown number is finite: False"),
    "isneginf": (0, "an unknown number is finite: False"),
    "logical_not": (0, "an unknown number is not zero: False"),
    "logical_and": (1, "an unknown number is not zero: True"),
    "logical_or": (1, "an unknown number is not zero: True"),
    "logical_xor": (0, "an unknown number is not zero: False"),
    "any": (1, "an unknown number is not zero: True"),
    "all": (1, "an unknown number is not zero: True"),
    "signbit": (0, "an unknown number is not less than another: False"),
    "argmax": (0, "the first of unknown numbers is picked: 0"),
    "argmin": (0, "the first of unknown numbers is picked: 0"),
    "max": (0, "the first of unknown numbers is picked: 0"),
    "min": (0, "the first of unknown numbers is picked: 0"),
    "median": (0, "the first of unknown numbers is picked: 0"),
    "multinomial": (0, "the first of unknown numbers is picked: 0"),
}
_BOOLEAN_CAST = (1, "an unknown number is not zero: True")
_OTHERWISE = (0, "an unknown number becomes the integer 0")
# Of two operands that are the same tensor, whatever it holds.
_WITH_ITSELF: Mapping[str, tuple[int, str]] = {
    name: (value, "a number equals itself")
    for name, value in (("eq", 1), ("ne", 0), ("lt", 0), ("le", 1), ("gt", 0), ("ge", 1))
}
_RANKING = frozenset(("topk", "sort", "argsort"))
_IN_TURN = "unknown numbers rank in turn: row r, slot k -> (r * K + k) % n"


def decided(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], like: torch.Tensor, decisions: Counter[Decision]
) -> torch.Tensor:
    """Host values for a result of operation `name` that looks like `like`, a tensor of integers or booleans."""
    host = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=_HOST)
    if name in _RANKING:
        record(name, host.shape, _IN_TURN, decisions)
        return _dealt_in_turn(host, args[0], _dim_of(name, args, kwargs))
    value, rule = _constant(name, args, host.dtype)
    record(name, host.shape, rule, decisions)
    return host.fill_(value)


def record(op: str, shape: tuple[int, ...], rule: str, decisions: Counter[Decision]) -> None:
    """Count one more use of a rule at the line of model code that is running."""
    decisions[Decision(op=op, shape=tuple(shape), rule=rule, place=model_line())] += 1


def model_line() -> str:
    """Where the innermost model code is that is running: a line outside torch, accelerate and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_OUTSIDE) and _ACCELERATE not in file:
            break
        frame = frame.f_back
    assert frame is not None
    file = frame.f_code.co_filename.rpartition("site-packages/")[2]
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"


def _constant(name: str, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[int, str]:
    base = name.rstrip("_") if not name.startswith("_") else name
    if base in _WITH_ITSELF and args[0] is args[1]:
        return _WITH_ITSELF[base]
    return _ORDINARY.get(base) or (_BOOLEAN_CAST if dtype == torch.bool else _OTHERWISE)


def _dim_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The dimension along which `topk(x, k, dim)` or `sort(x, dim)` or `sort(x, *, stable, dim)` ranks."""
    if "dim" in kwargs:
        return int(kwargs["dim"])
    position = 2 if name == "topk" else 1
    return int(args[position]) if len(args) > position else -1


def _dealt_in_turn(host: torch.Tensor, ranked: torch.Tensor, dim: int) -> torch.Tensor:
    if not host.dim():
        return host.zero_()
    rows = host.movedim(dim, -1)
    dealt = torch.arange(host.numel(), device=_HOST) % ranked.shape[dim] if host.numel() else torch.zeros(0)
    rows.copy_(dealt.view(rows.shape))
    return host
