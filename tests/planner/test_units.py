"""Sizes as text: what is read, what is refused, and that whatever is written is read back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.units import GIB, KIB, MIB, format_bytes, parse_bytes, shorthand

READ = {
    "zero needs no unit": ("0", 0),
    "zero with a point": ("0.0", 0),
    "zero with a unit": ("0GiB", 0),
    "bytes": ("17B", 17),
    "GiB is 2**30": ("24GiB", 24 * 2**30),
    "GB is 10**9": ("24GB", 24 * 10**9),
    "MiB": ("500MiB", 500 * 2**20),
    "MB": ("500MB", 500 * 10**6),
    "KiB": ("3KiB", 3 * 1024),
    "KB": ("3KB", 3000),
    "TiB": ("2TiB", 2 * 2**40),
    "TB": ("2TB", 2 * 10**12),
    "lower case": ("24gib", 24 * 2**30),
    "a blank between": ("24 GiB", 24 * 2**30),
    "blanks around": ("  24GiB\t", 24 * 2**30),
    "a fraction": ("1.5GiB", 3 * 2**29),
    "a fraction is rounded to a byte": ("0.3B", 0),
}


@pytest.mark.parametrize(("text", "num_bytes"), READ.values(), ids=READ)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


REFUSED = {
    "empty": ("", "'' is not a size: write a number and a unit, such as 24GiB or 500MiB"),
    "no number": ("GiB", "'GiB' is not a size"),
    "negative": ("-1GiB", "'-1GiB' is not a size"),
    "exponent": ("1e3GiB", "'1e3GiB' is not a size"),
    "no digit before the point": (".5GiB", "'.5GiB' is not a size"),
    "two numbers": ("1GiB2GiB", "'1GiB2GiB' is not a size"),
    "no unit": ("24", "'24' has no unit: write 24GiB (2**30 bytes) or 24GB (10**9 bytes)"),
    "no unit, fraction": ("0.5", "'0.5' has no unit: write 0.5GiB"),
    "unknown unit": ("24GX", "'24GX' has the unknown unit 'GX': known are B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"),
    "bare G": ("24G", "has the unknown unit 'G'"),
    "bits": ("24Gbit", "has the unknown unit 'Gbit'"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_size_is_refused_with_the_rule(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_bytes(text)
    assert message in str(caught.value)


SHOWN = {
    "zero": (0, "0 B"),
    "the last byte count": (KIB - 1, "1023 B"),
    "the first KiB": (KIB, "1.0 KiB"),
    "the last KiB": (MIB - 1, "1024.0 KiB"),
    "the first MiB": (MIB, "1.0 MiB"),
    "below a tenth of a GiB": (GIB // 10 - 1, "102.4 MiB"),
    "a tenth of a GiB": (GIB // 10, "0.10 GiB"),
    "GiB with two decimals": (round(23.64 * GIB), "23.64 GiB"),
    "negative bytes": (-5, "-5 B"),
    "negative GiB": (-3 * GIB, "-3.00 GiB"),
}


@pytest.mark.parametrize(("num_bytes", "text"), SHOWN.values(), ids=SHOWN)
def test_a_size_is_shown_with_its_unit(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


SHORT = {
    "zero": (0, "0B"),
    "GiB": (24 * GIB, "24GiB"),
    "MiB when GiB is not exact": (500 * MIB, "500MiB"),
    "KiB": (MIB + KIB, "1025KiB"),
    "bytes": (24 * GIB + 1, "25769803777B"),
}


@pytest.mark.parametrize(("num_bytes", "text"), SHORT.values(), ids=SHORT)
def test_shorthand_takes_the_largest_exact_unit(num_bytes: int, text: str) -> None:
    assert shorthand(num_bytes) == text


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 2**50), st.sampled_from([1, KIB, MIB]))
def test_shorthand_is_read_back_exactly(number: int, factor: int) -> None:
    assert parse_bytes(shorthand(number // factor * factor)) == number // factor * factor
