"""Weights arrive whole before they are packed: that room by hand, and plans whose devices are fullest then."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console

from planner.assembly import make_plan
from planner.errors import InfeasibleError
from planner.graph import INPUTS, Flow, Linear, ModuleGraph, ModuleGroup, PhaseCost
from planner.machine import Machine
from planner.memory import WORKSPACE_BYTES
from planner.packing import packed_while_loaded, packing_bytes
from planner.phase_peaks import peaks_by_phase
from planner.plan import ModelSummary, Plan
from planner.polynomial import Quantities, constant
from planner.problem import PlacedStage, Problem, evaluate
from planner.quantisation import LAYOUTS, held_in
from planner.report import report
from planner.shortfall import infeasible
from planner.solve import chain_dp
from planner.units import KIB, MIB
from planner.workload import Workload

SIDE = 1024
WHOLE = 2 * SIDE * SIDE
"""Bytes of one weight in 16 bits."""
COUNTS = Quantities(batch=1, images=0, patches=0, text_tokens=3, image_tokens=0, positions=5)


@pytest.mark.parametrize(
    ("layout", "itemsize", "expected"),
    [
        ("int8", 2, 2 * WHOLE),  # as it arrived, and in float16 from the host
        ("int8", 4, 3 * WHOLE),
        ("nf4", 2, WHOLE),
        ("fp4", 4, 2 * WHOLE),
        ("nf4-double", 2, WHOLE + 2 * 4 * SIDE * SIDE // 64),  # two float32 for every block of 64
    ],
)
def test_bytes_beside_those_that_stay(layout: str, itemsize: int, expected: int) -> None:
    assert packing_bytes(LAYOUTS[layout], Linear("up", SIDE, SIDE), itemsize) == expected


def layer(index: int) -> ModuleGroup:
    name = f"layers.{index}"
    cost = PhaseCost(moments_bytes=(constant(KIB),), read_bytes=constant(WHOLE))
    linears = (Linear(f"{name}.up", SIDE, SIDE), Linear(f"{name}.gate", SIDE, SIDE // 2))
    return ModuleGroup(
        id=name,
        modules=(name,),
        role="decoder_layer",
        module_list="layers",
        weight_bytes=3 * WHOLE // 2,
        num_parameters=3 * WHOLE // 4,
        kv_bytes_per_position=KIB,
        prefill=cost,
        decode=cost,
        linears=linears,
    )


IDS = Flow(tensor="input_ids", producer=INPUTS, consumers=("layers.0",), phase="prefill", num_bytes=constant(8))
PLAIN = ModuleGraph(name="toy", dtype="float16", groups=tuple(map(layer, range(4))), flows=(IDS,))
HELD = held_in(PLAIN, {one.name: LAYOUTS["int8"] for group in PLAIN for one in group.linears}, 1)
GRAPH = packed_while_loaded(HELD)
STAYS = sum(group.weight_bytes for group in GRAPH)
OVERHEADS = WORKSPACE_BYTES
"""Machines here have neither context nor reserve."""


def problem(*devices: int, positions: int = COUNTS.positions) -> Problem:
    machine = Machine.parse(",".join(f"{num_bytes // KIB}KiB" for num_bytes in devices))
    machine = machine.with_overheads(context_bytes=0, reserve_bytes=0)
    return Problem.of(GRAPH, machine, replace(COUNTS, positions=positions))


def plan_of(asked: Problem) -> Plan:
    solution = chain_dp.solve(asked)
    if solution.status == "INFEASIBLE":
        raise infeasible(asked, solution)
    summary = ModelSummary(
        name="toy", architecture="Toy", num_parameters=1, weight_bytes=GRAPH.weight_bytes, dtype="float16"
    )
    workload = Workload(dtype="float16", kv_dtype="float16", quantize="int8", num_images=0)
    return make_plan(asked, solution, model=summary, workload=workload, fingerprint="0")


def text_of(plan: Plan) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(report(plan))
    return capture.get()


def test_only_graphs_with_packed_weights_take_more_and_each_group_its_largest() -> None:
    assert [group.loading_bytes for group in GRAPH] == [2 * WHOLE] * 4
    assert not any(group.loading_bytes for group in HELD)


def test_a_device_peaks_while_it_is_loaded_where_that_is_more_than_running() -> None:
    asked = problem(OVERHEADS + STAYS + 2 * WHOLE)
    plan = plan_of(asked)
    assert plan.memory[0].total_bytes == plan.machine.devices[0].memory_bytes
    assert plan.loading == (0,)
    assert "cuda:0 is fullest while weights are loaded" in text_of(plan)
    assert Plan.from_dict(plan.to_dict()) == plan
    running = peaks_by_phase(asked, (PlacedStage(device=0, members=(0, 1, 2, 3)),))
    assert max(part[0].total_bytes for part in running.values()) < plan.memory[0].total_bytes - WHOLE


def test_a_plan_that_could_run_and_not_be_loaded_is_refused() -> None:
    with pytest.raises(InfeasibleError, match=r"cuda:0 could run its part in 58.1 MiB: .* arrive whole") as refusal:
        plan_of(problem(OVERHEADS + STAYS + 2 * WHOLE - KIB))
    assert refusal.value.shortfall_bytes == {"cuda:0": KIB}


def test_a_long_cache_takes_the_room_that_loading_had() -> None:
    """The room for positions is counted when the model runs, so loading takes none of it away."""
    asked = problem(OVERHEADS + STAYS + 2 * WHOLE)
    activations = KIB + COUNTS.text_tokens * 7 * SIDE  # int8 inputs, and products in int32 and float16
    assert plan_of(asked).kv_tokens == (2 * WHOLE - activations) // (4 * KIB)
    long = plan_of(problem(OVERHEADS + STAYS + 3 * WHOLE, positions=1024))
    assert long.loading == ()
    assert "fullest" not in text_of(long)


def test_the_solver_and_the_evaluator_agree_on_every_cut() -> None:
    room = OVERHEADS + STAYS // 2 + 2 * WHOLE
    for first in (room - 64 * KIB, room, room + STAYS // 4, room + 8 * MIB):
        asked = problem(first, room + STAYS // 4)
        found = chain_dp.solve(asked)
        cuts = [(tuple(range(cut)), tuple(range(cut, 4))) for cut in range(1, 4)]
        tried = [
            evaluate(asked, tuple(PlacedStage(device=i, members=m) for i, m in enumerate(order)))
            for low, high in cuts
            for order in ((low, high), (high, low))
        ]
        best = max((one.kv_positions or 0 for one in tried if one.fits), default=None)
        assert (found.status == "INFEASIBLE") == (best is None)
        if best is not None:
            assert evaluate(asked, found.stages).kv_positions == best
    fractions = [evaluate(problem(size), (PlacedStage(device=0, members=(0, 1, 2, 3)),)) for size in (room, 2 * room)]
    assert all(low.free_fraction < high.free_fraction for low, high in pairwise(fractions))
