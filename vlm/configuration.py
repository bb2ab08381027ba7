"""Checks that configurations share: each gives a sentence per key that breaks a rule, to be raised all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def is_number(value: Any, *, at_least: float) -> bool:
    """Whether a value from a file is a number (a boolean is not) and large enough."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= at_least


def not_positive(values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """One sentence per key whose value is no whole number of at least 1."""
    wrong = [key for key in keys if not isinstance(values[key], int) or not is_number(values[key], at_least=1)]
    return [f"{key} is {values[key]!r}; it must be a whole number of at least 1" for key in wrong]


def not_multiple(values: Mapping[str, Any], key: str, of: str) -> list[str]:
    """A sentence when `key`'s value is not a whole multiple of `of`'s."""
    return [f"{key} {values[key]} is not a multiple of {of} {values[of]}"] if values[key] % values[of] else []


def not_equal(values: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One sentence per key that says something else than every model of a family does; a missing key says nothing."""
    wrong = [key for key in expected if values.get(key, expected[key]) != expected[key]]
    return [f"{key} is {values[key]!r}; every model of this family has {expected[key]!r}" for key in wrong]


def refuse(name: str, problems: list[str]) -> None:
    """Raise ValueError with everything that is wrong with the configuration class `name`, if anything is."""
    if problems:
        raise ValueError(f"{name}: {'; '.join(problems)}")
