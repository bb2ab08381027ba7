"""Explanations of graphs small enough to be worked out by hand, and the arithmetic of bounds and precisions.

The toy has two decoder layers of width 8 with 4 heads of 2, which share 2 key-value heads, and a feed-forward of 16.
"""

from __future__ import annotations

from dataclasses import replace
from math import isclose
from typing import Any

import pytest

from planner.errors import ConstraintError
from planner.explanation import DecoderFacts, LayerSplit, layer_split, parts_of, precisions_of
from planner.graph import ModuleGraph, ModuleGroup, PhaseCost, Role
from planner.machine import Device, Machine
from planner.phase_bounds import Bound, PhaseBound, device_bounds, quantised_bytes
from planner.polynomial import Quantities, constant
from planner.timing import BANDWIDTH_FRACTION, FLOPS_FRACTION, LAUNCH_S

ATTENTION = 2 * 8 * 2 * (4 + 2)
GATED = 3 * 8 * 16
LAYER_PARAMETERS = ATTENTION + GATED + 16
KV_BYTES = 2 * 2 * 2 * 2
"""Key and value of 2 heads of 2, in 16 bits."""

ONE = Quantities(batch=1, images=1, patches=4, text_tokens=3, image_tokens=4, positions=10)
FACTS = DecoderFacts(hidden_size=8, num_layers=2, num_heads=4, head_dim=2, ffn_width=16)
DEVICE = Device(index=0, memory_bytes=2**40, bandwidth_bytes_per_s=1e9, flops_per_s=1e12)


def cost(*, flops: int = 0, read_bytes: int = 0, launches: int = 0) -> PhaseCost:
    return PhaseCost(flops=constant(flops), read_bytes=constant(read_bytes), launches=constant(launches))


def group(name: str, role: Role, num_parameters: int, **changes: Any) -> ModuleGroup:
    fields = {"modules": (name,), "weight_bytes": 2 * num_parameters, **changes}
    return ModuleGroup(id=name, role=role, num_parameters=num_parameters, **fields)


def layer(index: int, num_parameters: int = LAYER_PARAMETERS, kv_bytes: int = KV_BYTES) -> ModuleGroup:
    read = cost(flops=2 * num_parameters, read_bytes=2 * num_parameters + 10 * kv_bytes, launches=3)
    return group(
        f"layers.{index}",
        "decoder_layer",
        num_parameters,
        module_list="layers",
        kv_bytes_per_position=kv_bytes,
        prefill=cost(flops=10**12, read_bytes=2 * num_parameters, launches=3),
        decode=read,
    )


def toy(*layers: ModuleGroup) -> ModuleGraph:
    """A traced graph as it is: vision blocks are elements of a list, and leaves that run before the text are norms."""
    return ModuleGraph(
        name="toy",
        dtype="float16",
        groups=(
            group("embed", "embedding", 100, modules=("embed", "boi"), decode=cost(read_bytes=200)),
            group("visual.patch_embed", "norm", 30, prefill=cost(flops=1)),
            group("visual.blocks.0", "decoder_layer", 60, module_list="visual.blocks", prefill=cost(flops=1)),
            group("visual.merger.mlp", "norm", 40, prefill=cost(flops=1)),
            group("rotary_emb", "norm", 0, weight_bytes=4, decode=cost(read_bytes=1)),
            *layers,
            group("norm", "norm", 8, decode=cost(read_bytes=64)),
            group("head", "head", 100, decode=cost(read_bytes=200)),
        ),
    )


TOY = toy(layer(0), layer(1))


# -- parts


def test_every_group_is_in_one_part_by_what_it_does() -> None:
    found = {part.name: (part.num_groups, part.num_parameters) for part in parts_of(TOY)}
    assert found == {
        "vision encoder": (2, 90),
        "projector": (1, 40),
        "embedding": (1, 100),
        "decoder layers": (2, 2 * LAYER_PARAMETERS),
        "norms": (2, 8),
        "head": (1, 100),
    }


def test_parts_that_are_not_there_are_left_out_and_none_is_lost() -> None:
    text = replace(TOY, groups=tuple(one for one in TOY if not one.id.startswith("visual")))
    parts = parts_of(text)
    assert [part.name for part in parts] == ["embedding", "decoder layers", "norms", "head"]
    assert sum(part.weight_bytes for part in parts) == text.weight_bytes


def test_what_shares_a_group_with_the_embedding_is_named() -> None:
    named = {part.name: part.modules for part in parts_of(TOY) if part.modules}
    assert named == {"embedding": ("embed", "boi")}


def test_layers_without_a_cache_in_the_same_list_are_decoder_layers_too() -> None:
    parts = parts_of(toy(layer(0), layer(1, kv_bytes=0)))
    assert [part.num_groups for part in parts if part.name == "decoder layers"] == [2]


# -- a decoder layer


def split(facts: DecoderFacts = FACTS, graph: ModuleGraph = TOY) -> LayerSplit:
    found = layer_split(graph, facts)
    assert found is not None
    return found


def test_a_layer_is_split_and_its_key_value_heads_are_what_the_cache_amounts_to() -> None:
    found = split()
    assert found.feed_forward is not None
    assert (found.num_kv_heads, found.attention_parameters) == (2, ATTENTION)
    assert (found.feed_forward.num_parameters, found.other_parameters) == (GATED, 16)
    assert found.full_kv_bytes_per_position == 2 * 2 * KV_BYTES
    assert found.feed_forward.step_bytes == 3 * 8 * 1024 * 2 * 2


def test_a_plain_feed_forward_has_two_matrices() -> None:
    found = split(replace(FACTS, ffn_width=24)).feed_forward
    assert found is not None and found.num_parameters == 2 * 8 * 24


def test_experts_are_counted_all_and_active() -> None:
    found = split(replace(FACTS, ffn_width=4, num_experts=4, num_active_experts=2)).feed_forward
    assert found is not None and (found.num_parameters, found.num_active_experts) == (4 * 3 * 8 * 4, 2)


CONTRADICTIONS = {
    "another number of layers": replace(FACTS, num_layers=3),
    "other key-value heads": replace(FACTS, num_kv_heads=4),
    "heads too wide for the cache": replace(FACTS, head_dim=8),
    "more attention than the layer holds": replace(FACTS, hidden_size=800),
}


@pytest.mark.parametrize("facts", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_config_that_is_not_of_this_graph_splits_nothing(facts: DecoderFacts) -> None:
    assert layer_split(TOY, facts) is None


@pytest.mark.parametrize("width", [None, 1000], ids=["not said", "wider than the layer"])
def test_a_feed_forward_that_is_not_known_is_left_out(width: int | None) -> None:
    found = split(replace(FACTS, ffn_width=width))
    assert found.feed_forward is None and found.other_parameters == LAYER_PARAMETERS - ATTENTION


def test_layers_of_two_kinds_are_described_by_the_usual_one() -> None:
    graph = toy(layer(0, LAYER_PARAMETERS + 5), layer(1), layer(2))
    found = split(replace(FACTS, num_layers=3), graph)
    assert (found.num_parameters, found.num_alike, found.num_layers) == (LAYER_PARAMETERS, 2, 3)


# -- precisions


def test_a_group_of_weights_has_its_scale_and_its_zero_point() -> None:
    assert quantised_bytes(128, 4) == 64 + (16 + 4) // 8
    assert quantised_bytes(128, 8) == 128 + (16 + 8) // 8
    assert quantised_bytes(129, 4) == 65 + 2 * 20 // 8


def test_only_what_is_named_is_quantised_and_the_rest_stays_in_16_bits() -> None:
    rows = {(row.name, len(row.quantised)): row.weight_bytes for row in precisions_of(parts_of(TOY))}
    total, layers, vision = TOY.num_parameters, 2 * LAYER_PARAMETERS, 130
    assert rows == {
        ("float32", 0): 4 * total,
        ("float16", 0): 2 * total,
        ("int8", 1): quantised_bytes(layers, 8) + 2 * (total - layers),
        ("int4", 1): quantised_bytes(layers, 4) + 2 * (total - layers),
        ("int4", 3): quantised_bytes(layers + vision, 4) + 2 * (total - layers - vision),
    }


# -- bounds


def bound_of(**needs: int) -> PhaseBound:
    one = group("layers.0", "decoder_layer", 10, module_list="layers", kv_bytes_per_position=1, decode=cost(**needs))
    return device_bounds(ModuleGraph(name="one", dtype="float16", groups=(one,)), DEVICE, ONE, 2).decode


@pytest.mark.parametrize(
    ("needs", "bound"),
    [
        ({"flops": 10**12, "read_bytes": 10**6, "launches": 1}, "compute"),
        ({"flops": 10**6, "read_bytes": 10**9, "launches": 1}, "bandwidth"),
        ({"flops": 10**6, "read_bytes": 10**3, "launches": 1000}, "launches"),
    ],
    ids=["compute", "bandwidth", "launches"],
)
def test_the_largest_need_binds(needs: dict[str, int], bound: Bound) -> None:
    found = bound_of(**needs)
    assert found.bound == bound
    assert isclose(found.compute_s, needs["flops"] / (FLOPS_FRACTION * 1e12))
    assert isclose(found.read_s, needs["read_bytes"] / (BANDWIDTH_FRACTION * 1e9))
    assert isclose(found.total_s, max(found.compute_s, found.read_s) + needs["launches"] * LAUNCH_S)


def test_prefill_sums_all_groups_and_decode_its_own() -> None:
    found = device_bounds(TOY, DEVICE, ONE, new_tokens=2)
    assert found.prefill.flops == 2 * 10**12 + 3 and found.prefill.bound == "compute"
    assert found.decode.launches == 6
    assert found.ridge_flops_per_byte == 1000


def test_int4_changes_what_layers_read_and_nothing_else() -> None:
    found = device_bounds(TOY, DEVICE, ONE, new_tokens=2)
    assert found.int4_decode is not None
    weights = 2 * 2 * LAYER_PARAMETERS
    int4 = weights * quantised_bytes(128, 4) / 256
    per_second = BANDWIDTH_FRACTION * 1e9
    fused, unpacked = found.int4_decode.fused_s, found.int4_decode.unpacked_s
    assert fused < found.decode.total_s < unpacked
    assert isclose(found.decode.total_s - fused, (weights - int4) / per_second, rel_tol=1e-3)
    assert isclose(unpacked - found.decode.total_s, (weights + int4) / per_second, rel_tol=1e-3)


def test_a_graph_in_32_bits_has_no_int4_to_compare_with() -> None:
    assert device_bounds(replace(TOY, dtype="float32"), DEVICE, ONE, 2).int4_decode is None


def test_whether_one_device_holds_the_weights_leaves_context_and_reserve_out() -> None:
    needed = TOY.weight_bytes + DEVICE.context_bytes + DEVICE.reserve_bytes
    fits = [device_bounds(TOY, replace(DEVICE, memory_bytes=needed - less), ONE, 2).fits_weights for less in (0, 1)]
    assert fits == [True, False]


def test_a_device_of_unknown_speed_is_refused() -> None:
    with pytest.raises(ConstraintError, match=r"cuda:0 \(24.00 GiB\) has no speed.*--gpus rtx4090"):
        device_bounds(TOY, Machine.parse("24GiB").devices[0], ONE, 2)
