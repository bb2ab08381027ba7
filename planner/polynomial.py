"""Costs that hold for any workload: polynomials with integer coefficients in a few named counts.

The variables are the fields of `Quantities`. A graph built once then answers every batch, image count and context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantities:
    """What one workload amounts to for one model.

    `images`, `patches`, `text_tokens`, `image_tokens` and `positions` are per sequence; multiply by `batch` for all.
    `patches` counts what the vision encoder sees (class tokens included), `image_tokens` what the language model
    sees, `positions` the KV cache's length.
    """

    batch: int
    images: int
    patches: int
    text_tokens: int
    image_tokens: int
    positions: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ValueError(f"{field.name} is {value}: counts are zero or more")


VARIABLES = tuple(field.name for field in fields(Quantities))


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A sum of integer coefficients times products of `Quantities` fields.

    `terms` maps a sorted tuple of variable names (with repetition for powers) to its coefficient.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    def __post_init__(self) -> None:
        unknown = {name for names, _ in self.terms for name in names} - set(VARIABLES)
        if unknown:
            raise ValueError(f"unknown variables {sorted(unknown)}: a cost may use {', '.join(VARIABLES)}")

    def __call__(self, quantities: Quantities) -> int:
        return sum(factor * prod(getattr(quantities, name) for name in names) for names, factor in self.terms)

    def __add__(self, other: Polynomial | int) -> Polynomial:
        terms = dict(self.terms)
        for names, factor in _as_polynomial(other).terms:
            terms[names] = terms.get(names, 0) + factor
        return from_terms(terms)

    __radd__ = __add__

    def __mul__(self, other: Polynomial | int) -> Polynomial:
        terms: dict[tuple[str, ...], int] = {}
        for left, left_factor in self.terms:
            for right, right_factor in _as_polynomial(other).terms:
                names = tuple(sorted(left + right))
                terms[names] = terms.get(names, 0) + left_factor * right_factor
        return from_terms(terms)

    __rmul__ = __mul__

    def covers(self, other: Polynomial) -> bool:
        """Whether no coefficient is below `other`'s, so that no workload makes `other` the larger one."""
        mine, others = dict(self.terms), dict(other.terms)
        return all(mine.get(names, 0) >= others.get(names, 0) for names in mine.keys() | others.keys())

    def to_dict(self) -> dict[str, int]:
        """`{"batch*text_tokens": 8192, "1": 64}`, for files."""
        return {"*".join(names) or "1": factor for names, factor in self.terms}

    @classmethod
    def from_dict(cls, terms: Mapping[str, int]) -> Polynomial:
        """The inverse of `to_dict`."""
        found: dict[tuple[str, ...], int] = {}
        for key, factor in terms.items():
            names = tuple(sorted(key.split("*"))) if key != "1" else ()
            found[names] = found.get(names, 0) + factor
        return from_terms(found)


def variable(name: str) -> Polynomial:
    """The polynomial that is one field of `Quantities`."""
    return Polynomial((((name,), 1),))


def constant(value: int) -> Polynomial:
    """The polynomial that is `value`, whatever the workload."""
    return from_terms({(): value})


def from_terms(terms: Mapping[tuple[str, ...], int]) -> Polynomial:
    """The polynomial of these coefficients by sorted variable names; zeros are left out."""
    return Polynomial(tuple(sorted((names, factor) for names, factor in terms.items() if factor)))


ZERO = Polynomial()


def _as_polynomial(value: Polynomial | int) -> Polynomial:
    return value if isinstance(value, Polynomial) else constant(value)
