"""Bounds against what is proven optimal, and how near placements of many unequal devices come to them."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.errors import ConstraintError
from planner.graph import Home
from planner.machine import Machine
from planner.polynomial import Quantities
from planner.problem import Objective, Problem, Solution, evaluate
from planner.shortfall import infeasible
from planner.solve import bounds, chain_dp
from planner.solve.search import Bar, Search
from planner.solve.segments import Segments
from planner.solve.states import States, num_limited
from planner.units import GIB
from tests.planner.test_chain_dp import Question, questions
from tests.planner.test_objectives import Question as TimedQuestion
from tests.planner.test_objectives import devices, row
from tests.planner.test_objectives import questions as timed_questions

BENCHMARK: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "solver.py"))
COUNTS = Quantities(batch=1, images=0, patches=0, text_tokens=1000, image_tokens=0, positions=1512)

briefly = settings(derandomize=True, deadline=None, max_examples=50)


def proven(problem: Problem) -> Solution:
    """The optimal solution of a problem that has one."""
    try:
        solution = chain_dp.solve(problem)
    except ConstraintError:
        assume(False)
    assume(solution.status == "OPTIMAL")
    return solution


@briefly
@given(questions())
def test_no_placement_has_more_room_than_the_bound_or_fewer_devices(question: Question) -> None:
    for objective in ("balance", "fewest"):
        problem = replace(question.problem, objective=objective)
        solution, segments = proven(problem), Segments(problem)
        assert bounds.bound(segments, len(solution.stages)) >= solution.value
        assert bounds.fewest_devices(segments) <= len(solution.stages)


@briefly
@given(timed_questions(far=True))
def test_no_placement_is_faster_than_the_bound(question: TimedQuestion) -> None:
    solution = proven(question.problem)
    assert bounds.bound(Segments(question.problem), len(solution.stages)) <= solution.value


@briefly
@given(timed_questions(links="unequal"))
def test_nor_over_unequal_links(question: TimedQuestion) -> None:
    solution = proven(question.problem)
    assert bounds.bound(Segments(question.problem), len(solution.stages)) <= solution.value


@briefly
@given(questions(), st.integers(0, 1))
def test_sets_of_few_devices_hold_what_all_sets_hold_on_as_few(question: Question, more: int) -> None:
    problem = replace(question.problem, objective="fewest")
    solution, segments = proven(problem), Segments(problem)
    states = States(segments, None, most=len(solution.stages) + more)
    sizes = [len(kind.positions) + 1 for kind in segments.classes]
    assert len(states) == num_limited(sizes, len(solution.stages) + more)
    search = Search(segments, states)
    options = search.coverable(Bar(), states.usable(1))
    fewest = options[states.used[options] == states.used[options].min()]
    assert search.most_extra(fewest) == (solution.value, solution.stages)


def problem_on(count: int, layer_gib: float, objective: Objective) -> Problem:
    return replace(
        Problem.of(BENCHMARK["big_graph"](layer_gib), BENCHMARK["big_machine"](count), COUNTS), objective=objective
    )


GAPS: dict[Objective, float] = {"balance": 0.0, "fewest": 0.0, "latency": 0.02, "throughput": 0.05}
"""What is left at most between the placement and the bound, for 126 layers on 20 cards."""


@pytest.mark.parametrize("objective", GAPS)
def test_twenty_unequal_cards_are_placed_within_a_few_percent_of_the_bound(objective: Objective) -> None:
    problem = problem_on(20, 1.0, objective)
    solution = chain_dp.solve(problem)
    assert solution.gap <= GAPS[objective]
    assert (solution.status == "OPTIMAL") == (solution.value == solution.bound)
    assert evaluate(problem, solution.stages).fits


def from_small_to_large(objective: Objective, home: Home | None = None) -> Problem:
    """126 layers of 1 GiB on eighteen cards of 8 to 25 GiB."""
    like = BENCHMARK["big_machine"](1).devices[0]
    cards = tuple(replace(like, index=i, memory_bytes=(8 + i) * GIB) for i in range(18))
    graph = replace(BENCHMARK["big_graph"](1.0), home=home)
    return replace(Problem.of(graph, Machine(devices=cards), COUNTS), objective=objective)


def test_cards_from_small_to_large_are_filled_alike() -> None:
    """The room is at the order's far end: what its first devices reach says nothing of the last."""
    problem = from_small_to_large("balance")
    solution = chain_dp.solve(problem)
    assert solution.gap < 0.1
    assert evaluate(problem, solution.stages).fits


@pytest.mark.parametrize(("objective", "most_more"), [("fewest", 1), ("latency", 2)])
def test_few_cards_are_used_though_the_smallest_holds_the_inputs(objective: Objective, most_more: int) -> None:
    problem = from_small_to_large(objective, Home(modules=("layers.1",)))
    solution = chain_dp.solve(problem)
    fewest = bounds.fewest_devices(Segments(replace(problem, objective="fewest")))
    assert len(solution.stages) <= fewest + most_more
    assert solution.stages[0].device == 0 or solution.stages[1].device == 0


def test_that_nothing_fits_on_many_unequal_cards_is_proven_where_the_bound_says_so() -> None:
    graph, machine = row(*[2] * 60), devices(*((3 + i / 10, 1e11 + i) for i in range(20)))
    problem = Problem.of(graph, machine, COUNTS)
    solution = chain_dp.solve(problem)
    assert (solution.status, solution.method) == ("INFEASIBLE", chain_dp.METHOD)
    assert "does not fit: " in str(infeasible(problem, solution))


def test_where_it_is_not_proven_the_message_does_not_say_so() -> None:
    problem = Problem.of(row(8), devices((4, 1e11)), COUNTS)
    solution = replace(chain_dp.solve(problem), method=chain_dp.UNFINISHED)
    assert " may not fit: no placement was found: " in str(infeasible(problem, solution))
