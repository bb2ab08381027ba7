"""Fitted costs: exact where costs are polynomials, never under where they bend, and honest about their range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cost_file import graph_from_dict, graph_to_dict
from planner.fit import Sample, SampledInterval, UnlikeSamplesError, fit
from planner.graph import INPUTS, Flow, Home, Interval, ModuleGraph, ModuleGroup, PhaseCost, Range
from planner.machine import Device
from planner.memory import CostTable
from planner.polynomial import Polynomial, Quantities, constant, variable

DEVICE = Device(index=0, memory_bytes=2**50)
Alive = Callable[[Quantities], dict[str, tuple[int, ...]]]


def at(text: int, batch: int = 1, images: int = 0) -> Quantities:
    """A run of two decode steps; an image takes ten positions."""
    return Quantities(
        batch=batch,
        images=images,
        patches=40 * images,
        text_tokens=text,
        image_tokens=10 * images,
        positions=text + 10 * images + 2,
    )


def sampled(quantities: Quantities, alive: Alive, flops: int = 0, flows: Sequence[Flow] = ()) -> Sample:
    """One run in which group `a` runs once, with what each group holds."""
    groups = tuple(
        ModuleGroup(
            id=name,
            modules=(name,),
            role="decoder_layer",
            weight_bytes=7,
            num_parameters=3,
            prefill=PhaseCost(flops=constant(flops)),
        )
        for name in "ab"
    )
    graph = ModuleGraph(name="toy", dtype="bfloat16", groups=groups, flows=tuple(flows), home=Home())
    interval = SampledInterval(phase="prefill", running="a", alive_bytes=tuple(alive(quantities).items()))
    return Sample(quantities=quantities, graph=graph, intervals=(interval,))


def peak(graph: ModuleGraph, quantities: Quantities, *members: int) -> int:
    return CostTable.of(graph, quantities).on_device(members or (0, 1), DEVICE).activations_bytes


def test_a_polynomial_of_degree_two_is_found_exactly() -> None:
    def alive(q: Quantities) -> dict[str, tuple[int, ...]]:
        return {"a": (5 * q.text_tokens**2 + 3 * q.text_tokens + 11,)}

    graph = fit([sampled(at(text), alive) for text in (16, 300, 1000)])
    for text in (1, 500, 123_456):
        assert peak(graph, at(text)) == alive(at(text))["a"][0]


def test_batch_multiplies_and_images_are_told_apart_from_text() -> None:
    def alive(q: Quantities) -> dict[str, tuple[int, ...]]:
        length = q.text_tokens + q.image_tokens
        return {"a": (q.batch * (length**2 + 9 * q.patches) + 4 * length,), INPUTS: (q.batch * length,)}

    runs = [(t, b, i) for b in (2, 3) for t, i in ((16, 1), (64, 1), (256, 1), (16, 2), (64, 2), (16, 3))]
    graph = fit([sampled(at(*run), alive) for run in runs])
    held_out = at(777, 5, 4)
    assert peak(graph, held_out) == alive(held_out)["a"][0]
    assert graph.home is not None
    assert [moment(held_out) for moment in graph.home.moments_bytes] == [alive(held_out)[INPUTS][0]]


def test_the_peak_moves_between_moments_without_being_sampled_on_both_sides() -> None:
    """Attention's scores overtake the feed-forward's product at 400 tokens; all samples lie below that."""

    def alive(q: Quantities) -> dict[str, tuple[int, ...]]:
        return {"a": (0, 4000 * q.text_tokens, 10 * q.text_tokens**2)}

    graph = fit([sampled(at(text), alive) for text in (16, 64, 256)])
    assert [peak(graph, at(text)) for text in (100, 1000)] == [400_000, 10_000_000]


@given(
    window=st.integers(20, 4000),
    slopes=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    held_out=st.integers(16, 4096),
)
def test_a_cost_that_bends_is_never_undercut(window: int, slopes: tuple[int, int], held_out: int) -> None:
    def alive(q: Quantities) -> dict[str, tuple[int, ...]]:
        before, after = min(q.text_tokens, window), max(0, q.text_tokens - window)
        return {"a": (slopes[0] * before + slopes[1] * after,)}

    texts = sorted({16, 512, window, 4096})
    graph = fit([sampled(at(text), alive) for text in texts])
    exact = alive(at(held_out))["a"][0]
    assert peak(graph, at(held_out)) >= exact
    if slopes[1] >= slopes[0]:
        assert peak(graph, at(held_out)) <= exact + 4 * 4096 // 100 + 4


def test_runs_that_allocate_differently_are_fitted_by_their_largest_moment() -> None:
    def alive(q: Quantities) -> dict[str, tuple[int, ...]]:
        return {"a": tuple(100 * i for i in range(1, q.images + 2))}

    runs = [(t, i) for t in (16, 64, 256) for i in (1, 2, 3)]
    graph = fit([sampled(at(text, 1, images), alive) for text, images in runs])
    assert peak(graph, at(50, 1, 2)) == 300


def test_what_only_longer_runs_hold_is_kept() -> None:
    def alive(q: Quantities) -> dict[str, tuple[int, ...]]:
        extra = max(0, q.text_tokens - 100)
        return {"a": (10,)} | ({"b": (extra,)} if extra else {})

    graph = fit([sampled(at(text), alive) for text in (16, 100, 1000)])
    assert peak(graph, at(1000), 1) == 900


def test_flows_that_only_some_runs_have_count_nothing_in_the_others() -> None:
    def flows(text: int) -> list[Flow]:
        sizes = {"hidden": 8 * text} | ({"mask": text * text} if text > 50 else {})
        return [
            Flow(tensor=name, producer="a", consumers=("b",), phase="prefill", num_bytes=constant(num_bytes))
            for name, num_bytes in sizes.items()
        ]

    graph = fit([sampled(at(text), lambda q: {"a": (1,)}, flows=flows(text)) for text in (16, 100, 1000)])
    hidden, mask = graph.flows
    assert (hidden.num_bytes(at(70)), mask.tensor) == (560, "mask")
    assert mask.num_bytes(at(1000)) >= 1_000_000


def test_other_groups_are_another_way_through_the_model() -> None:
    one, other = (sampled(at(text), lambda q: {"a": (1,)}) for text in (16, 64))
    renamed = replace(other, graph=replace(other.graph, groups=other.graph.groups[:1]))
    with pytest.raises(UnlikeSamplesError, match="toy: the groups of runs of other sizes differ"):
        fit([one, renamed])


def test_one_sample_makes_constants() -> None:
    graph = fit([sampled(at(64), lambda q: {"a": (640,)}, flops=77)])
    cost = graph.groups[0].prefill
    assert cost is not None
    assert (peak(graph, at(9999)), cost.flops(at(1))) == (640, 77)


def test_counts_outside_the_traced_range_are_named() -> None:
    graph = fit([sampled(at(text), lambda q: {"a": (1,)}) for text in (16, 64, 256)])
    assert Range(variable="text_tokens", low=16, high=256) in graph.valid
    assert graph.extrapolated(at(100)) == ()
    assert graph.extrapolated(at(300)) == ("text_tokens", "positions")
    assert graph.extrapolated(at(100, batch=2)) == ("batch",)


def test_an_interval_that_another_one_covers_is_dropped_and_changes_no_peak() -> None:
    def with_intervals(quantities: Quantities) -> Sample:
        sample = sampled(quantities, lambda q: {"a": (10 * q.text_tokens,), "b": (5,)})
        smaller = SampledInterval(phase="prefill", running="b", alive_bytes=(("a", (9 * quantities.text_tokens,)),))
        return replace(sample, intervals=(smaller, *sample.intervals))

    graph = fit([with_intervals(at(text)) for text in (16, 64, 256)])
    assert len(graph.intervals) == 1
    assert peak(graph, at(100)) == 1005


def test_a_copy_that_arrived_keeps_its_interval() -> None:
    """On a device that holds both groups the copy is not made: then the other interval is the larger one."""
    lone = SampledInterval(phase="prefill", running="a", alive_bytes=(("a", (90,)),))
    copied = SampledInterval(phase="prefill", running="a", alive_bytes=(("a", (100,)),), arrived_bytes=(("b", 50),))
    sample = replace(sampled(at(16), lambda q: {}), intervals=(copied, lone))
    graph = fit([sample])
    assert (peak(graph, at(16), 0), peak(graph, at(16), 0, 1)) == (100, 90)


POLYNOMIALS = st.dictionaries(
    st.lists(st.sampled_from(["batch", "text_tokens", "positions"]), max_size=3).map(
        lambda names: tuple(sorted(names))
    ),
    st.integers(-5, 10**12),
    max_size=3,
).map(lambda terms: sum((factor * _product(names) for names, factor in terms.items()), Polynomial()))


def _product(names: tuple[str, ...]) -> Polynomial:
    product = constant(1)
    for name in names:
        product = product * variable(name)
    return product


@given(moments=st.lists(POLYNOMIALS, min_size=1, max_size=3), copied=POLYNOMIALS)
def test_a_graph_survives_its_file(moments: list[Polynomial], copied: Polynomial) -> None:
    sample = sampled(at(16), lambda q: {"a": (3,)}, flops=5, flows=[])
    flow = Flow(tensor="x", producer=INPUTS, consumers=("a", "b"), phase="decode", num_bytes=copied, revisits=True)
    interval = Interval(phase="decode", running="b", held=(("a", tuple(moments)),), arrived=(("a", copied),))
    graph = replace(
        fit([sample]), flows=(flow,), intervals=(interval,), home=Home(modules=("a",), moments_bytes=tuple(moments))
    )
    assert graph_from_dict(graph_to_dict(graph)) == graph


def test_copies_that_a_shared_device_saves_are_never_overestimated() -> None:
    """They are subtracted: what bends is taken from below, and what some runs do not copy at all is not counted."""

    def with_copies(text: int) -> Sample:
        copied = (("b", min(text, 100) ** 2),) if text > 16 else (("b", 1),)
        interval = SampledInterval(
            phase="prefill", running="a", alive_bytes=(("a", (10**6,)), ("b", (5,))), arrived_bytes=copied
        )
        return replace(sampled(at(text), lambda q: {}), intervals=(interval,))

    texts = (16, 50, 100, 1000)
    graph = fit([with_copies(text) for text in texts])
    saved = [graph.intervals[0].arrived[0][1](at(text)) for text in texts]
    assert all(
        value <= dict(with_copies(text).intervals[0].arrived_bytes)["b"]
        for value, text in zip(saved, texts, strict=True)
    )


def test_a_group_that_only_some_runs_reach_costs_nothing_in_the_others() -> None:
    def without_a(sample: Sample) -> Sample:
        groups = (replace(sample.graph.groups[0], prefill=None), *sample.graph.groups[1:])
        return replace(sample, graph=replace(sample.graph, groups=groups))

    first, *others = (sampled(at(text), lambda q: {"a": (1,)}, flops=10 * text) for text in (16, 64, 256))
    cost = fit([without_a(first), *others]).groups[0].prefill
    assert cost is not None
    assert [cost.flops(at(text)) >= 10 * text for text in (64, 256)] == [True, True]
