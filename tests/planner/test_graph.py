"""The module graph: what it refuses, what it sums, and its form as a networkx graph."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest

from planner.graph import INPUTS, Flow, Fusion, ModuleGraph, ModuleGroup, PhaseCost, dependency_graph
from planner.polynomial import ZERO, Quantities, constant, variable


def group(name: str, **costs: Any) -> ModuleGroup:
    values = {"modules": (name,), "role": "decoder_layer", "weight_bytes": 10, "num_parameters": 5, **costs}
    return ModuleGroup(id=name, **values)


def flow(producer: str, *consumers: str, tensor: str = "hidden_states", phase: Any = "prefill") -> Flow:
    return Flow(tensor=tensor, producer=producer, consumers=consumers, phase=phase, num_bytes=constant(8))


def graph(*groups: ModuleGroup, **parts: Any) -> ModuleGraph:
    return ModuleGraph(name="toy", dtype="float16", groups=groups, **parts)


def test_a_graph_without_groups_is_empty_and_weighs_nothing() -> None:
    empty = graph()
    assert (list(empty), empty.weight_bytes, empty.num_parameters, empty.kv_bytes_per_position) == ([], 0, 0, 0)
    assert len(dependency_graph(empty)) == 0


def test_sums_are_over_all_groups() -> None:
    toy = graph(group("a", kv_bytes_per_position=3), group("b", weight_bytes=7, num_parameters=1))
    assert (toy.weight_bytes, toy.num_parameters, toy.kv_bytes_per_position) == (17, 6, 3)


def test_groups_are_found_by_id_and_listed_in_their_order() -> None:
    toy = graph(group("b"), group("a"))
    assert [member.id for member in toy] == ["b", "a"] and toy.group("a") is toy.groups[1]
    with pytest.raises(KeyError, match="c"):
        toy.group("c")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a group twice": ({"groups": (group("a"), group("a", modules=("b",)))}, "group named more than once: a"),
    "a module in two groups": (
        {"groups": (group("a", modules=("x", "y")), group("b", modules=("y",)))},
        "module named more than once: y",
    ),
    "a module twice in a group": ({"groups": (group("a", modules=("x", "x")),)}, "module named more than once: x"),
    "a flow from nowhere": (
        {"groups": (group("a"),), "flows": (flow("z", "a"),)},
        "flow 'hidden_states' names unknown groups: z",
    ),
    "a flow to nowhere": (
        {"groups": (group("a"),), "flows": (flow("a", "a", "y", "z"),)},
        "flow 'hidden_states' names unknown groups: y, z",
    ),
    "a fusion of nothing known": (
        {"groups": (group("a"),), "fusions": (Fusion(op="torch.cat", operands=("a", "z"), reason="joined"),)},
        "fusion 'torch.cat' names unknown groups: z",
    ),
    "a fusion with the inputs": (
        {"groups": (group("a"),), "fusions": (Fusion(op="torch.cat", operands=("a", INPUTS), reason="joined"),)},
        "fusion 'torch.cat' names unknown groups: inputs",
    ),
}


@pytest.mark.parametrize(("parts", "message"), REFUSED.values(), ids=REFUSED)
def test_a_graph_that_contradicts_itself_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleGraph(name="toy", dtype="float16", **parts)


def test_the_inputs_may_produce_and_consume() -> None:
    toy = graph(group("a"), flows=(flow(INPUTS, "a"), flow("a", INPUTS)))
    assert list(dependency_graph(toy)) == ["a"] and not dependency_graph(toy).edges


REFUSED_GROUPS: dict[str, tuple[dict[str, Any], str]] = {
    "no modules": ({"modules": ()}, "group 'a' holds no modules: a group is one or more FQNs"),
    "negative weights": ({"weight_bytes": -1}, "group 'a' has a negative cost: bytes and counts are zero or more"),
    "negative parameters": ({"num_parameters": -1}, "group 'a' has a negative cost"),
    "negative KV cache": ({"kv_bytes_per_position": -1}, "group 'a' has a negative cost"),
}


@pytest.mark.parametrize(("costs", "message"), REFUSED_GROUPS.values(), ids=REFUSED_GROUPS)
def test_a_group_without_modules_or_with_a_negative_cost_is_refused(costs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group("a", **costs)


def test_a_group_costs_nothing_in_a_phase_in_which_it_does_not_run() -> None:
    prefill = PhaseCost(flops=constant(1))
    only = group("a", prefill=prefill)
    assert (only.cost("encode"), only.cost("prefill"), only.cost("decode")) == (None, prefill, None)


def test_which_moment_is_the_peak_depends_on_the_workload() -> None:
    cost = PhaseCost(moments_bytes=(100 * variable("text_tokens"), constant(1000)))
    counts = {"batch": 1, "images": 0, "patches": 0, "image_tokens": 0, "positions": 0}
    assert cost.transient_bytes(Quantities(**counts, text_tokens=9)) == 1000
    assert cost.transient_bytes(Quantities(**counts, text_tokens=11)) == 1100
    assert PhaseCost(flops=ZERO).transient_bytes(Quantities(**counts, text_tokens=1)) == 0


def test_the_dependency_graph_has_groups_as_nodes_and_tensors_on_edges() -> None:
    toy = graph(
        group("a"),
        group("b", role="head", weight_bytes=3),
        group("c"),
        flows=(flow(INPUTS, "a"), flow("a", "b", "c"), flow("a", "c", tensor="mask"), flow("b", "c", phase="decode")),
    )
    network = dependency_graph(toy)
    assert network.nodes["b"] == {"role": "head", "weight_bytes": 3, "modules": ("b",)}
    assert dict(network.edges) == {
        ("a", "b"): {"tensors": ("hidden_states",)},
        ("a", "c"): {"tensors": ("hidden_states", "mask")},
        ("b", "c"): {"tensors": ("hidden_states",)},
    }
    assert list(network) == ["a", "b", "c"] and nx.is_directed_acyclic_graph(network)
