"""Costs as polynomials: a commutative ring that evaluates consistently and survives being written down."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.polynomial import VARIABLES, ZERO, Polynomial, Quantities, constant, variable

ONE_OF_EACH = {"batch": 2, "images": 3, "patches": 5, "text_tokens": 7, "image_tokens": 11, "positions": 13}
WORKLOAD = Quantities(**ONE_OF_EACH)

NAMES = st.lists(st.sampled_from(VARIABLES), max_size=3).map("*".join).map(lambda name: name or "1")
POLYNOMIALS = st.dictionaries(NAMES, st.integers(-9, 9), max_size=4).map(Polynomial.from_dict)
WORKLOADS = st.builds(Quantities, **{name: st.integers(0, 10**6) for name in VARIABLES})

ring = settings(derandomize=True, deadline=None, max_examples=150)


def test_zero_is_empty_and_evaluates_to_zero() -> None:
    assert ZERO == constant(0) == Polynomial() and ZERO(WORKLOAD) == 0
    assert variable("batch") * 0 == ZERO


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_is_a_field_of_the_quantities(name: str) -> None:
    assert variable(name)(WORKLOAD) == ONE_OF_EACH[name]


def test_the_variables_are_the_fields_of_quantities() -> None:
    assert tuple(ONE_OF_EACH) == VARIABLES == tuple(field.name for field in fields(Quantities))


def test_a_cost_worked_out_by_hand() -> None:
    tokens = variable("batch") * (variable("text_tokens") + variable("image_tokens"))
    cost = 4 * tokens * tokens + variable("positions") + 100
    assert cost(WORKLOAD) == 4 * (2 * 18) ** 2 + 13 + 100


@ring
@given(POLYNOMIALS, POLYNOMIALS, POLYNOMIALS)
def test_addition_and_multiplication_make_a_commutative_ring(a: Polynomial, b: Polynomial, c: Polynomial) -> None:
    assert a + b == b + a and a * b == b * a
    assert (a + b) + c == a + (b + c) and (a * b) * c == a * (b * c)
    assert a * (b + c) == a * b + a * c
    assert a + 0 == a == a * 1 and a + a * -1 == ZERO


@ring
@given(POLYNOMIALS, POLYNOMIALS, WORKLOADS)
def test_evaluation_respects_sums_and_products(a: Polynomial, b: Polynomial, at: Quantities) -> None:
    assert (a + b)(at) == a(at) + b(at) and (a * b)(at) == a(at) * b(at)


@ring
@given(POLYNOMIALS, st.integers(-9, 9))
def test_a_number_means_the_constant(a: Polynomial, number: int) -> None:
    assert a + number == number + a == a + constant(number)
    assert a * number == number * a == a * constant(number)


@ring
@given(POLYNOMIALS)
def test_a_polynomial_survives_being_written_down(a: Polynomial) -> None:
    assert Polynomial.from_dict(a.to_dict()) == a
    assert 0 not in a.to_dict().values()


def test_the_written_form_is_readable() -> None:
    cost = 8192 * variable("text_tokens") * variable("batch") + 64
    assert cost.to_dict() == {"1": 64, "batch*text_tokens": 8192}


@pytest.mark.parametrize("key", ["pixels", "batch*pixels", "", "1*batch"])
def test_an_unknown_variable_is_refused_with_the_known_ones(key: str) -> None:
    with pytest.raises(ValueError, match=r"unknown variables \['.*'\]: a cost may use batch, images, patches"):
        Polynomial.from_dict({key: 1})


@pytest.mark.parametrize("name", VARIABLES)
def test_a_negative_count_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1: counts are zero or more"):
        Quantities(**{**ONE_OF_EACH, name: -1})


def test_counts_of_zero_are_counts() -> None:
    assert variable("images")(Quantities(**dict.fromkeys(VARIABLES, 0))) == 0
