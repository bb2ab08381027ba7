"""Module paths go by segments: `layers.1` is no prefix of `layers.10`, and a map keeps its meaning when shortened."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.paths import collapse, contains, owner

CONTAINS = {
    "itself": ("model.layers.1", "model.layers.1", True),
    "a child": ("model.layers.1", "model.layers.1.attention.wqkv", True),
    "layer 1 is not layer 10": ("model.layers.1", "model.layers.10", False),
    "nor inside it": ("model.layers.1", "model.layers.10.attention", False),
    "output is not output_norm": ("output", "output_norm", False),
    "a parent is not inside its child": ("model.layers.1", "model.layers", False),
    "the root holds everything": ("", "model.layers.1", True),
    "the root holds itself": ("", "", True),
    "nothing but the root holds the root": ("model", "", False),
}


@pytest.mark.parametrize(("module", "path", "expected"), CONTAINS.values(), ids=CONTAINS)
def test_contains_compares_segments(module: str, path: str, expected: bool) -> None:
    assert contains(module, path) is expected


OWNERS = {
    "the longest wins": ("a.b.c", ["a", "a.b", "a.b.c.d"], "a.b"),
    "the order of candidates is irrelevant": ("a.b.c", ["a.b", "a", ""], "a.b"),
    "an exact match": ("a.b", ["a", "a.b"], "a.b"),
    "layer 10 is not owned by layer 1": ("layers.10.w", ["layers.1", "layers.10"], "layers.10"),
    "a near prefix owns nothing": ("layers.10.w", ["layers.1"], None),
    "the root owns what nobody else does": ("x.y", ["a", ""], ""),
    "no candidates": ("x", [], None),
    "the root path": ("", ["a"], None),
}


@pytest.mark.parametrize(("path", "modules", "expected"), OWNERS.values(), ids=OWNERS)
def test_owner_is_the_longest_containing_module(path: str, modules: list[str], expected: str | None) -> None:
    assert owner(path, modules) == expected


COLLAPSED = {
    "nothing": ({}, {}),
    "one module is the root": ({"a.b": 0}, {"": 0}),
    "all agree": ({"a": 0, "b.c": 0, "b.d": 0}, {"": 0}),
    "a parent stands for its children": ({"a.x": 0, "a.y": 0, "b": 1}, {"a": 0, "b": 1}),
    "at any depth": ({"a.x.p": 0, "a.x.q": 0, "a.y": 0, "b": 1}, {"a": 0, "b": 1}),
    "not for children that differ": ({"a.x": 0, "a.y": 1}, {"a.x": 0, "a.y": 1}),
    "lists stay spelled out": (
        {"m.layers.0": 0, "m.layers.1": 0, "m.norm": 1},
        {"m.layers.0": 0, "m.layers.1": 0, "m.norm": 1},
    ),
    "elements of a list are collapsed": (
        {"layers.0.a": 0, "layers.0.b": 0, "layers.1.a": 1},
        {"layers.0": 0, "layers.1": 1},
    ),
    "a list inside a module that agrees": ({"m.layers.0": 0, "m.layers.1": 0, "n": 1}, {"m": 0, "n": 1}),
    "a path that is also a parent": ({"a": 0, "a.b": 1}, {"a": 0, "a.b": 1}),
    "1 and 10 are neighbours, not parent and child": (
        {"l.1.w": 0, "l.10.w": 1, "l.11.w": 1},
        {"l.1": 0, "l.10": 1, "l.11": 1},
    ),
}


@pytest.mark.parametrize(("placement", "expected"), COLLAPSED.values(), ids=COLLAPSED)
def test_a_map_is_shortened_to_its_parents(placement: dict[str, int], expected: dict[str, int]) -> None:
    assert collapse(placement) == expected


def test_the_shortened_map_keeps_the_order_of_the_first_mention() -> None:
    assert list(collapse({"z.a": 0, "m": 1, "z.b": 0, "a": 1})) == ["z", "m", "a"]


LEAVES = st.lists(
    st.lists(st.sampled_from(["a", "b", "1", "10"]), min_size=3, max_size=3).map(".".join), min_size=1, unique=True
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.data(), LEAVES)
def test_every_leaf_keeps_its_device_and_no_entry_can_be_merged_further(data: st.DataObject, leaves: list[str]) -> None:
    placement = {leaf: data.draw(st.integers(0, 1), label=leaf) for leaf in leaves}
    short = collapse(placement)
    assert {leaf: short[str(owner(leaf, short))] for leaf in leaves} == placement
    assert len(short) <= len(placement)
    assert collapse(short) == short
