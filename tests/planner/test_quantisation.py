"""Bytes of each layout by hand, and what a graph becomes when some of its linear layers are held so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.assembly import make_plan
from planner.cost_file import graph_from_dict, graph_to_dict
from planner.errors import SourceError
from planner.graph import Interval, Linear, ModuleGraph, ModuleGroup, PhaseCost, Role
from planner.machine import Machine
from planner.memory import CostTable
from planner.plan import ModelSummary, Plan
from planner.polynomial import Quantities, constant
from planner.problem import Problem
from planner.quantisation import (
    LAYOUTS,
    Decompressed,
    Float8,
    FourBit,
    Layout,
    Packed,
    Pass,
    chosen_linears,
    held_in,
    kept_modules,
)
from planner.solve import chain_dp
from planner.workload import Workload

ODD = Linear("odd", rows=3, cols=70)
"""210 weights: four blocks of 64, the last not full."""
SQUARE = Linear("square", rows=256, cols=512)
ONE = Quantities(batch=1, images=1, patches=6, text_tokens=3, image_tokens=4, positions=10)
TWO = replace(ONE, batch=2)


@pytest.mark.parametrize(
    ("layout", "linear", "expected"),
    [
        (LAYOUTS["nf4"], ODD, 105 + 4 * 4 + 16 * 4),
        (LAYOUTS["fp4"], ODD, 105 + 4 * 4 + 16 * 4),
        (LAYOUTS["nf4-double"], ODD, 105 + 4 + 16 * 4 + (1 + 1 + 256) * 4),
        (LAYOUTS["nf4-double"], SQUARE, 65536 + 2048 + 16 * 4 + (8 + 1 + 256) * 4),
        (LAYOUTS["int8"], ODD, 210 + 3 * 4),
        (Packed(name="gptq", bits=4, group_size=128, order=True), SQUARE, 65536 + 4 * 128 + 4 * 512 + 512 * 4),
        (Packed(name="gptq", bits=8, group_size=None, order=True), SQUARE, 131072 + 256 + 512 + 512 * 4),
        (Packed(name="awq", bits=4, group_size=128), SQUARE, 65536 + 4 * 128 + 4 * 512),
        (Float8(), SQUARE, 131072 + 2 * 4 * 4),
        (Float8(block=(1, 0)), SQUARE, 131072 + 256 * 4),
        (Float8(block=(0, 0)), SQUARE, 131072 + 4),
        (Decompressed(name="packed", bits=4, group_size=64, has_shape=True), SQUARE, 2 * 131072 + 256 * 8 * 2 + 16),
        (Decompressed(name="int8", bits=8, kept_bytes=7), SQUARE, 2 * 131072 + 7),
    ],
    ids=lambda value: value.name if isinstance(value, Linear) else None,
)
def test_bytes_of_a_weight(layout: Layout, linear: Linear, expected: int) -> None:
    assert layout.weight_bytes(linear, 2) == expected


def group(name: str, role: Role, *linears: Linear, **costs: PhaseCost) -> ModuleGroup:
    num_parameters = sum(linear.num_weights for linear in linears) + 100
    return ModuleGroup(
        id=name,
        modules=(name,),
        role=role,
        module_list=name.rpartition(".")[0] or None,
        weight_bytes=2 * num_parameters,
        num_parameters=num_parameters,
        kv_bytes_per_position=4 if role == "decoder_layer" else 0,
        linears=linears,
        **costs,
    )


def cost(read_bytes: int) -> PhaseCost:
    return PhaseCost(moments_bytes=(constant(50),), read_bytes=constant(read_bytes), launches=constant(10))


QUERY, UP = Linear("layers.0.q", 64, 64), Linear("layers.0.up", 256, 64)
NUM_WEIGHTS = QUERY.num_weights + UP.num_weights
TOY = ModuleGraph(
    name="toy",
    dtype="bfloat16",
    groups=(
        group("visual.0", "vision_encoder", Linear("visual.0.fc", 64, 64), encode=cost(9000)),
        group("embed", "embedding"),
        group("layers.0", "decoder_layer", QUERY, UP, prefill=cost(50_000), decode=cost(45_000)),
        group("head", "head", Linear("head", 300, 64), prefill=cost(40_000), decode=cost(40_000)),
    ),
    intervals=(
        Interval(phase="prefill", running="layers.0", held=(("layers.0", (constant(70), constant(80))),)),
        Interval(phase="decode", running="layers.0", held=(("layers.0", (constant(9),)),)),
        Interval(phase="prefill", running="head", held=(("layers.0", (constant(5),)),)),
    ),
)


def held(name: str, *, vision: bool = False, batch: int = 1) -> ModuleGraph:
    return held_in(TOY, {linear.name: LAYOUTS[name] for linear in chosen_linears(TOY, vision=vision)}, batch)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_group_weighs_what_its_layers_do_in_the_layout_and_all_else_what_it_did(name: str) -> None:
    plain, graph = TOY.group("layers.0"), held(name)
    layers = sum(LAYOUTS[name].weight_bytes(linear, 2) for linear in (QUERY, UP))
    assert graph.group("layers.0").weight_bytes == plain.weight_bytes - 2 * NUM_WEIGHTS + layers
    for other in ("visual.0", "embed", "head"):
        assert graph.group(other) == TOY.group(other)
    assert graph.plain is TOY
    assert graph.held == (("layers.0.q", name), ("layers.0.up", name))


def test_the_vision_path_is_quantised_on_request_and_the_head_never() -> None:
    assert [linear.name for linear in chosen_linears(TOY, vision=True)] == ["visual.0.fc", "layers.0.q", "layers.0.up"]
    assert kept_modules(held("nf4")) == ("visual", "head")
    assert kept_modules(held("nf4", vision=True)) == ("head",)


def test_a_tied_head_is_kept_although_no_layer_of_its_own_is_listed_for_it() -> None:
    embed = replace(TOY.group("embed"), modules=("embed", "head"))
    tied = replace(TOY, groups=(embed, TOY.group("layers.0")), intervals=())
    graph = held_in(tied, {"layers.0.q": LAYOUTS["int8"], "layers.0.up": LAYOUTS["int8"]}, 1)
    assert kept_modules(graph) == ("embed", "head")


def test_four_bits_are_unpacked_for_more_rows_than_one() -> None:
    unpacked = 2 * UP.num_weights
    one, two = held("nf4"), held("nf4", batch=2)
    assert activations(one, "prefill", ONE) == 80 + unpacked
    assert [max(m(ONE) for m in i.held[0][1]) for i in one.intervals] == [80 + unpacked, 9, 5]
    assert [max(m(TWO) for m in i.held[0][1]) for i in two.intervals] == [80 + unpacked, 9 + unpacked, 5]


def test_products_in_float32_hold_weights_inputs_and_results_in_both() -> None:
    plain, cast = LAYOUTS["fp4"], FourBit(name="fp4", product_itemsize=4)
    counts = replace(ONE, text_tokens=7, image_tokens=0)
    for rows in (1, 7):
        one = pass_of(rows)
        weight = 0 if rows == 1 else 4 * SQUARE.num_weights
        more = cast.scratch_bytes(SQUARE, one)(counts) - plain.scratch_bytes(SQUARE, one)(counts)
        assert more == weight + 4 * rows * (SQUARE.rows + SQUARE.cols)
    assert cast.weight_bytes(SQUARE, 2) == plain.weight_bytes(SQUARE, 2)


def test_eight_bits_need_room_for_their_inputs_and_for_products_in_int32() -> None:
    rows = 7  # three text and four image tokens
    needed = rows * (UP.cols + 6 * UP.rows)
    assert activations(held("int8"), "prefill", ONE) == 80 + needed


def pass_of(num_tokens: int) -> Pass:
    return Pass(tokens=constant(num_tokens), itemsize=2, num_rows=num_tokens)


@pytest.mark.parametrize(
    ("layout", "linear", "num_tokens", "expected"),
    [
        (LAYOUTS["nf4"], SQUARE, 1, 0),
        (LAYOUTS["nf4"], ODD, 1, 2 * 210),  # 70 inputs do not fill blocks of 64
        (LAYOUTS["nf4"], SQUARE, 2, 2 * 131072),
        (LAYOUTS["nf4-double"], SQUARE, 1, 2 * 2048 * 4),
        (LAYOUTS["nf4-double"], SQUARE, 2, 2 * 131072 + 2 * 2048 * 4),
        (LAYOUTS["int8"], Linear("down", rows=16, cols=100), 3, 3 * 6 * 100),  # wider in than out
        (LAYOUTS["int8"], Linear("up", rows=100, cols=16), 3, 3 * (16 + 6 * 100)),
        (Packed(name="awq", bits=4, group_size=128), SQUARE, 1, 0),
        (Packed(name="awq", bits=4, group_size=128), SQUARE, 1024, 2 * 131072),
        (Decompressed(name="int8", bits=8), SQUARE, 5, 0),
    ],
    ids=lambda value: value.name if isinstance(value, Linear) else None,
)
def test_bytes_that_a_product_needs_for_a_moment(
    layout: Layout, linear: Linear, num_tokens: int, expected: int
) -> None:
    assert layout.scratch_bytes(linear, pass_of(num_tokens))(ONE) == expected


def activations(graph: ModuleGraph, phase: str, quantities: Quantities) -> int:
    """What the layer's device peaks at, by the replay of the intervals and by the moments of the group."""
    layer = [i for i, one in enumerate(graph) if one.id == "layers.0"]
    replayed = CostTable.of(graph, quantities).on_device(layer, Machine.parse("1GiB").devices[0]).activations_bytes
    moments = graph.group("layers.0").prefill
    assert moments is not None and replayed >= moments.transient_bytes(quantities)
    return replayed


def test_a_step_reads_packed_weights_and_launches_more_kernels() -> None:
    plain, step = TOY.group("layers.0").decode, held("nf4").group("layers.0").decode
    assert plain is not None and step is not None
    packed = sum(LAYOUTS["nf4"].weight_bytes(linear, 2) for linear in (QUERY, UP))
    assert step.read_bytes(ONE) == plain.read_bytes(ONE) - 2 * NUM_WEIGHTS + packed
    assert step.launches(ONE) == plain.launches(ONE) + 2 * LAYOUTS["nf4"].launches


@pytest.mark.parametrize(("batch", "copied"), [(1, 0), (4, 0), (5, 2 * 2 * NUM_WEIGHTS)])
def test_a_few_rows_are_multiplied_packed_and_more_by_a_copy_that_is_written_and_read(batch: int, copied: int) -> None:
    plain, step = TOY.group("layers.0").decode, held("nf4", batch=batch).group("layers.0").decode
    assert plain is not None and step is not None
    packed = sum(LAYOUTS["nf4"].weight_bytes(linear, 2) for linear in (QUERY, UP))
    assert step.read_bytes(ONE) == plain.read_bytes(ONE) - 2 * NUM_WEIGHTS + packed + copied


def test_a_prompt_writes_and_reads_unpacked_weights_besides() -> None:
    plain, prompt = TOY.group("layers.0").prefill, held("nf4").group("layers.0").prefill
    assert plain is not None and prompt is not None
    packed = sum(LAYOUTS["nf4"].weight_bytes(linear, 2) for linear in (QUERY, UP))
    assert prompt.read_bytes(ONE) == plain.read_bytes(ONE) + packed + 2 * NUM_WEIGHTS


def test_a_file_of_costs_keeps_the_linear_layers() -> None:
    assert graph_from_dict(graph_to_dict(TOY)) == TOY


def plan_of(graph: ModuleGraph, quantize: str = "nf4") -> Plan:
    machine = Machine.parse("rtx4090")
    problem = Problem.of(graph, machine, ONE)
    summary = ModelSummary(
        name="toy", architecture="Toy", num_parameters=9, weight_bytes=graph.weight_bytes, dtype="bfloat16"
    )
    workload = Workload(dtype="bfloat16", kv_dtype="bfloat16", quantize=quantize)  # type: ignore[arg-type]
    plan = make_plan(problem, chain_dp.solve(problem), model=summary, workload=workload, fingerprint="0")
    return replace(plan, input_devices={"input_ids": 0})


def test_a_plan_says_what_is_quantised_and_what_a_token_would_take_without() -> None:
    part = plan_of(held("nf4")).quantization
    plain = plan_of(TOY, "none")
    assert part is not None and plain.quantization is None
    assert (part.layouts, part.kept, part.num_layers, part.stored) == (("nf4",), ("visual", "head"), 2, False)
    assert part.plain_bytes == 2 * NUM_WEIGHTS
    assert part.plain_bytes - part.weight_bytes == TOY.weight_bytes - held("nf4").weight_bytes
    assert part.plain_tpot_s == plain.estimate.tpot_s and part.plain_ttft_s == plain.estimate.ttft_s
    text = " ".join(part.sentences("bfloat16", 0.5))
    assert "Quantised while loading: 2 linear layers in nf4" in text and "layers of visual, head" in text


def test_names_of_kept_modules_match_from_the_start_and_to_a_boundary() -> None:
    part = plan_of(held("nf4")).quantization
    assert part is not None and part.skip_modules == ["^visual", "^head"]
    assert replace(part, kept=("a.b",)).skip_modules == [r"^a\.b"]


def test_a_quantised_plan_is_read_back_equal_and_a_plain_one_has_no_word_of_it() -> None:
    plan = plan_of(held("nf4"))
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert "quantiz" not in plan_of(TOY, "none").to_yaml()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layouts": []}, "quantization names no layouts"),
        ({"kept": None}, "is damaged"),
        ({"bits": 4}, "unexpected keyword argument 'bits'"),
    ],
)
def test_a_damaged_quantization_is_refused(change: dict[str, object], said: str) -> None:
    content = plan_of(held("nf4")).to_dict()
    content["quantization"] |= change
    with pytest.raises(SourceError, match=said):
        Plan.from_dict(content)


def test_a_plan_that_quantises_and_does_not_say_what_is_refused() -> None:
    content = plan_of(held("nf4")).to_dict()
    del content["quantization"]
    with pytest.raises(SourceError, match="quantize is nf4, and quantization does not say of what"):
        Plan.from_dict(content)


@pytest.mark.parametrize("name", ["none", "auto"])
def test_a_vision_path_in_no_named_layout_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"quantize_vision with quantize '{name}'"):
        Workload(quantize=name, quantize_vision=True)  # type: ignore[arg-type]


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="quantize is 'int3': known are none, auto, int8, nf4"):
        Workload(quantize="int3")  # type: ignore[arg-type]
