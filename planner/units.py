"""Bytes and seconds as text: the only place where a size becomes an integer, or an integer a size.

GiB is 2**30 and GB is 10**9, everywhere. A bare number is refused: "24" of what?
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import groupby

KIB = 2**10
MIB = 2**20
GIB = 2**30
EIB = 2**60

_BYTES_PER_UNIT = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `24GiB`, `500 MiB` or `0`.

    Raises: ValueError when there is no number, no unit (except for zero), or an unknown unit.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 24GiB or 500MiB")
    number, unit = match.groups()
    if not unit:
        if float(number) == 0:
            return 0
        raise ValueError(f"{text!r} has no unit: write {number}GiB (2**30 bytes) or {number}GB (10**9 bytes)")
    if unit.lower() not in _BYTES_PER_UNIT:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}: known are B, KB, MB, GB, TB, KiB, MiB, GiB, TiB")
    num_bytes = round(Fraction(number) * _BYTES_PER_UNIT[unit.lower()])
    if num_bytes >= EIB:
        raise ValueError(f"{text[:40]!r} is 1 EiB (2**60 bytes) or more: no machine holds that")
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """A size for people, with its unit: GiB from 0.1 GiB up, else MiB, KiB or B.

    Two decimals for GiB, one for MiB; a negative size keeps its sign.
    """
    magnitude = abs(num_bytes)
    if magnitude >= GIB // 10:
        return f"{num_bytes / GIB:.2f} GiB"
    if magnitude >= MIB:
        return f"{num_bytes / MIB:.1f} MiB"
    if magnitude >= KIB:
        return f"{num_bytes / KIB:.1f} KiB"
    return f"{num_bytes} B"


def format_seconds(seconds: float) -> str:
    """`1.25 s`, or `12.5 ms` below a tenth of a second."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def shorthand(num_bytes: int) -> str:
    """The shortest exact spelling that `parse_bytes` reads back: `24GiB`, `500MiB`, `1234B`."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes and num_bytes % factor == 0:
            return f"{num_bytes // factor}{unit}"
    return f"{num_bytes}B"


def counted(texts: Iterable[str]) -> str:
    """`24GiB`, `24GiB` and `l4` as `2x24GiB,l4`."""
    runs = ((text, len(list(same))) for text, same in groupby(texts))
    return ",".join(f"{count}x{text}" if count > 1 else text for text, count in runs)
