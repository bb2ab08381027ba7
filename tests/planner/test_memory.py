"""The eight parts of memory on graphs small enough to be worked out by hand.

The workload has batch 2, 3 text tokens, 4 image tokens and 10 positions.
"""

from __future__ import annotations

from typing import Any

import pytest

from planner.graph import INPUTS, Flow, ModuleGraph, ModuleGroup, PhaseCost
from planner.machine import Device
from planner.memory import LABELS, WORKSPACE_BYTES, CostTable, MemoryBreakdown, StageLoad
from planner.polynomial import Quantities, constant, variable

WORKLOAD = Quantities(batch=2, images=1, patches=5, text_tokens=3, image_tokens=4, positions=10)
DEVICE = Device(index=0, memory_bytes=10**9, context_bytes=1000, reserve_bytes=2000)


def group(name: str, weight_bytes: int, **costs: Any) -> ModuleGroup:
    return ModuleGroup(
        id=name, modules=(name,), role="decoder_layer", weight_bytes=weight_bytes, num_parameters=1, **costs
    )


def moments(*byte_counts: int) -> PhaseCost:
    return PhaseCost(moments_bytes=tuple(map(constant, byte_counts)))


def lasting(tensor: str, phase: Any, num_bytes: int, producer: str, *consumers: str, is_buffer: bool = False) -> Flow:
    return Flow(
        tensor=tensor,
        producer=producer,
        consumers=consumers,
        phase=phase,
        num_bytes=constant(num_bytes),
        lasting=True,
        is_buffer=is_buffer,
    )


VIT, EMBED, LAYER0, LAYER1, HEAD = range(5)

TOY = ModuleGraph(
    name="toy",
    dtype="float16",
    groups=(
        group("vit", 100, encode=moments(90, 70)),
        group("embed", 50, prefill=moments(30), decode=moments(4), logits_bytes=7 * variable("batch")),
        group(
            "layer0", 20, kv_bytes_per_position=3, prefill=moments(40, 60), decode=moments(5), buffer_bytes=constant(1)
        ),
        group("layer1", 20, kv_bytes_per_position=2, prefill=moments(61), decode=moments(75), buffer_bytes=constant(2)),
        group("head", 40, prefill=moments(8), decode=moments(8), logits_bytes=11 * variable("batch")),
    ),
    flows=(
        lasting("pixel_values", "encode", 12, INPUTS, "vit"),
        lasting("mask", "prefill", 25, "embed", "layer0", "layer1"),
        lasting("rope", "prefill", 5, "embed", "layer0", "layer1"),
        lasting("rope", "decode", 6, "embed", "layer0", "layer1"),
        lasting("table", "prefill", 300, "embed", "layer0", "layer1", is_buffer=True),
        lasting("table", "decode", 200, "embed", "layer0", "layer1", is_buffer=True),
        lasting("causal", "decode", 50, "embed", "layer0", is_buffer=True),
        Flow(tensor="hidden", producer="embed", consumers=("layer0",), phase="prefill", num_bytes=constant(10**6)),
        Flow(tensor="hidden", producer="layer0", consumers=("layer1",), phase="prefill", num_bytes=constant(10**6)),
        Flow(tensor="hidden", producer="layer1", consumers=("head",), phase="prefill", num_bytes=constant(10**6)),
    ),
)
TABLE = CostTable.of(TOY, WORKLOAD)

# name: (groups, weights, KV cache = per position x batch 2 x 10 positions, activations, logits, buffers)
# Buffers are the groups' own (layer0 1, layer1 2) and the shared ones of prefill (300) or decode (200 + 50).
WORKED_OUT: dict[str, tuple[tuple[int, ...], int, int, int, int, int]] = {
    "vit: encode 12 lasting + 90": ((VIT,), 100, 0, 102, 0, 0),
    "embed: prefill 25 + 5 lasting + 30": ((EMBED,), 50, 0, 60, 14, 300),
    "layer0: prefill 30 + 60, the larger moment": ((LAYER0,), 20, 60, 90, 0, 301),
    "layer1: prefill 30 + 61 over decode 6 + 75": ((LAYER1,), 20, 40, 91, 0, 302),
    "head: no lasting flow": ((HEAD,), 40, 0, 8, 22, 0),
    "both layers: lasting flows once, the hungrier layer": ((LAYER0, LAYER1), 40, 100, 91, 0, 303),
    "vit and layer0: encode 102 over prefill 90": ((VIT, LAYER0), 120, 60, 102, 0, 301),
    "vit and embed": ((VIT, EMBED), 150, 0, 102, 14, 300),
    "layer1 and head": ((LAYER1, HEAD), 60, 40, 91, 22, 302),
    "everything": ((VIT, EMBED, LAYER0, LAYER1, HEAD), 230, 100, 102, 36, 303),
    "neighbours are not required": ((HEAD, LAYER0), 60, 60, 90, 22, 301),
}


@pytest.mark.parametrize(
    ("members", "weights", "kv_cache", "activations", "logits", "buffers"), WORKED_OUT.values(), ids=WORKED_OUT
)
def test_the_parts_are_those_worked_out_by_hand(
    members: tuple[int, ...], weights: int, kv_cache: int, activations: int, logits: int, buffers: int
) -> None:
    assert TABLE.on_device(members, DEVICE) == MemoryBreakdown(
        weights_bytes=weights,
        kv_cache_bytes=kv_cache,
        activations_bytes=activations,
        logits_bytes=logits,
        buffers_bytes=buffers,
        workspace_bytes=WORKSPACE_BYTES,
        context_bytes=1000,
        reserve_bytes=2000,
    )


def test_an_unused_device_costs_nothing_not_even_a_context() -> None:
    assert TABLE.on_device((), DEVICE) == MemoryBreakdown()
    assert MemoryBreakdown().total_bytes == 0


def test_the_phase_that_peaks_changes_with_the_device_it_is_on() -> None:
    """Decode: 6 lasting + 75. Prefill without the mask and rope of the embedding: 61."""
    toy = ModuleGraph(name="toy", dtype="float16", groups=TOY.groups, flows=TOY.flows[3:])
    table = CostTable.of(toy, WORKLOAD)
    assert table.on_device((LAYER1,), DEVICE).activations_bytes == 81
    assert table.on_device((EMBED,), DEVICE).activations_bytes == 30


def test_a_lasting_flow_counts_once_on_each_device_that_makes_or_reads_it() -> None:
    alone = [TABLE.on_device((member,), DEVICE).activations_bytes for member in (EMBED, LAYER0, LAYER1)]
    assert alone == [30 + 30, 30 + 60, 30 + 61]
    assert TABLE.on_device((EMBED, LAYER0, LAYER1), DEVICE).activations_bytes == 30 + 61


def test_a_flow_that_does_not_last_is_not_added_to_the_groups_own_moments() -> None:
    assert TABLE.on_device((EMBED, LAYER0), DEVICE).activations_bytes < 10**6


def test_shared_buffers_are_those_of_the_phase_with_most_of_them() -> None:
    decoding = ModuleGraph(name="toy", dtype="float16", groups=TOY.groups, flows=TOY.flows[5:])
    table = CostTable.of(decoding, WORKLOAD)
    assert [table.on_device((member,), DEVICE).buffers_bytes for member in (VIT, EMBED, LAYER0, LAYER1)] == [
        0,
        200 + 50,
        200 + 50 + 1,
        200 + 2,
    ]
    assert table.on_device((LAYER1,), DEVICE).activations_bytes == 75


def test_the_total_is_the_sum_of_exactly_eight_parts_in_the_documented_order() -> None:
    peak = MemoryBreakdown(
        weights_bytes=1,
        kv_cache_bytes=2,
        activations_bytes=4,
        logits_bytes=8,
        buffers_bytes=16,
        workspace_bytes=32,
        context_bytes=64,
        reserve_bytes=128,
    )
    assert peak.total_bytes == 255 == sum(peak.parts.values())
    assert list(peak.parts.values()) == [1, 2, 4, 8, 16, 32, 64, 128]
    order = ["weights", "kv_cache", "activations", "logits", "buffers", "workspace", "context", "reserve"]
    assert list(peak.parts) == order == list(LABELS)


def test_the_kv_cache_grows_with_batch_and_positions() -> None:
    longer = CostTable.of(TOY, Quantities(batch=5, images=1, patches=5, text_tokens=3, image_tokens=4, positions=100))
    assert longer.on_device((LAYER0, LAYER1), DEVICE).kv_cache_bytes == (3 + 2) * 5 * 100
    none = CostTable.of(TOY, Quantities(batch=1, images=0, patches=0, text_tokens=1, image_tokens=0, positions=0))
    assert none.on_device((LAYER0, LAYER1), DEVICE).kv_cache_bytes == 0


def test_without_images_nothing_is_encoded() -> None:
    pixels = Flow(
        tensor="pixel_values",
        producer=INPUTS,
        consumers=("vit",),
        phase="encode",
        num_bytes=12 * variable("images"),
        lasting=True,
    )
    vit = group("vit", 100, encode=PhaseCost(moments_bytes=(90 * variable("images"),)))
    toy = ModuleGraph(name="toy", dtype="float16", groups=(vit,), flows=(pixels,))
    blind = Quantities(batch=1, images=0, patches=0, text_tokens=3, image_tokens=0, positions=10)
    assert CostTable.of(toy, blind).on_device((0,), DEVICE).activations_bytes == 0
    assert CostTable.of(toy, WORKLOAD).on_device((0,), DEVICE).activations_bytes == 102


def test_growing_a_stage_group_by_group_gives_the_same_as_all_at_once() -> None:
    stage = StageLoad(TABLE)
    for end, member in enumerate((VIT, EMBED, LAYER0, LAYER1, HEAD), start=1):
        stage.add(member)
        assert stage.breakdown(DEVICE) == TABLE.on_device(range(end), DEVICE)
        overheads = WORKSPACE_BYTES + DEVICE.context_bytes + DEVICE.reserve_bytes
        assert stage.running_bytes == stage.breakdown(DEVICE).total_bytes - overheads
