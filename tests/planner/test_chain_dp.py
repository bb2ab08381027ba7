"""The exact solver against brute force over every placement: it must find the same one, not just an equally good one.

The oracle shares no code with the solver. It works from the graph: it merges fused groups itself, adds up the eight
parts itself, lists every way to cut up to eight units into stages on up to three devices, and ranks them by the rule:
most devices, then most extra KV positions on the worst device, then the largest smallest free fraction, then stage by
stage the lowest device and the longest run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import combinations, permutations
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.constraints import Constraints
from planner.errors import ConstraintError
from planner.graph import INPUTS, PHASES, Flow, Fusion, Interval, ModuleGraph, ModuleGroup, PhaseCost
from planner.machine import Device, Machine
from planner.memory import WORKSPACE_BYTES
from planner.polynomial import Quantities, constant, variable
from planner.problem import Problem, Solution, evaluate
from planner.solve import chain_dp
from planner.units import MIB
from planner.workload import Workload
from vlm.model import find_model

GRAIN = 16 * MIB
"""Sizes are small multiples of it, so that ties are common and the workspace does not drown the rest."""

ANY_KV = 2**62
"""The objective where no device holds any KV cache."""

oracle = settings(derandomize=True, deadline=None, max_examples=400)
briefly = settings(oracle, max_examples=100)


# -- the oracle

Stage = tuple[int, tuple[int, ...]]
"""A device's position and the groups on it."""


@dataclass(frozen=True)
class Candidate:
    """One legal placement, scored from first principles."""

    stages: tuple[Stage, ...]
    left_bytes: tuple[int, ...]
    extra_positions: int
    free_fraction: Fraction

    @property
    def fits(self) -> bool:
        return min(self.left_bytes) >= 0

    @property
    def rank(self) -> tuple[Any, ...]:
        """The larger the better."""
        lowest_device_longest_run = tuple((-device, len(members)) for device, members in self.stages)
        return (len(self.stages), self.extra_positions, self.free_fraction, lowest_device_longest_run)


@dataclass(frozen=True)
class Question:
    """A placement problem in plain terms, and brute force over its answers."""

    graph: ModuleGraph
    machine: Machine
    quantities: Quantities
    constraints: Constraints

    @property
    def problem(self) -> Problem:
        return Problem.of(self.graph, self.machine, self.quantities, self.constraints)

    @cached_property
    def units(self) -> list[list[int]]:
        """Groups that must stay together, each set at its first member's place."""
        position = {group.id: i for i, group in enumerate(self.graph)}
        home = list(range(len(position)))
        for fusion in self.graph.fusions:
            if fusion.hard or not self.constraints.split_vision:
                joined = {home[position[operand]] for operand in fusion.operands}
                home = [min(joined) if unit in joined else unit for unit in home]
        return [[i for i, unit in enumerate(home) if unit == first] for first in sorted(set(home))]

    def left_bytes(self, device: Device, members: tuple[int, ...]) -> int:
        """Memory that stays free, by the definitions in the documentation."""
        if members not in self.known_bytes:
            self.known_bytes[members] = self.used_bytes(members)
        overheads = WORKSPACE_BYTES + device.context_bytes + device.reserve_bytes
        return device.memory_bytes - self.known_bytes[members] - overheads

    @cached_property
    def known_bytes(self) -> dict[tuple[int, ...], int]:
        """What groups take together, once per set of them."""
        return {}

    def used_bytes(self, members: tuple[int, ...]) -> int:
        at, groups = self.quantities, [self.graph.groups[member] for member in members]
        names = {group.id for group in groups}
        peaks, buffers = [], []
        for phase in PHASES:
            costs = [cost for group in groups if (cost := group.cost(phase))]
            hungriest = max((moment(at) for cost in costs for moment in cost.moments_bytes), default=0)
            lasting = [
                flow
                for flow in self.graph.flows
                if flow.lasting and flow.phase == phase and names & {flow.producer, *flow.consumers}
            ]
            peaks.append(hungriest + sum(flow.num_bytes(at) for flow in lasting if not flow.is_buffer))
            buffers.append(sum(flow.num_bytes(at) for flow in lasting if flow.is_buffer))
        for interval in self.graph.intervals:
            local = interval.arrived if interval.running in names else ()
            copies = sum(num_bytes(at) for source, num_bytes in local if source in names)
            held = (max(moment(at) for moment in moments) for name, moments in interval.held if name in names)
            peaks.append(sum(held) - copies)
        own = sum(group.weight_bytes + group.buffer_bytes(at) + group.logits_bytes(at) for group in groups)
        kv_cache = self.kv_bytes_per_position(members) * at.positions
        return own + kv_cache + max(peaks) + max(buffers)

    def kv_bytes_per_position(self, members: tuple[int, ...]) -> int:
        return sum(self.graph.groups[member].kv_bytes_per_position for member in members) * self.quantities.batch

    def candidates(self) -> Iterator[Candidate]:
        """Every legal placement, whether it fits or not."""
        count = len(self.units)
        for num_stages in range(1, min(count, len(self.machine.devices)) + 1):
            for cuts in combinations(range(1, count), num_stages - 1):
                runs = [
                    tuple(sorted(member for unit in self.units[start:end] for member in unit))
                    for start, end in zip((0, *cuts), (*cuts, count), strict=True)
                ]
                for devices in permutations(range(len(self.machine.devices)), num_stages):
                    stages = tuple(zip(devices, runs, strict=True))
                    if self.keeps_pins(stages):
                        yield self.candidate(stages)

    def keeps_pins(self, stages: tuple[Stage, ...]) -> bool:
        where = {self.graph.groups[member].id: device for device, members in stages for member in members}
        return all(where[name] == device for name, device in self.constraints.pins.items())

    def candidate(self, stages: tuple[Stage, ...]) -> Candidate:
        devices = [self.machine.devices[device] for device, _ in stages]
        runs = [members for _, members in stages]
        left = tuple(map(self.left_bytes, devices, runs))
        per_position = map(self.kv_bytes_per_position, runs)
        return Candidate(
            stages=stages,
            left_bytes=left,
            extra_positions=min((b // kv for b, kv in zip(left, per_position, strict=True) if kv), default=ANY_KV),
            free_fraction=min(Fraction(b, device.memory_bytes) for b, device in zip(left, devices, strict=True)),
        )

    def best(self) -> Candidate | None:
        """The right answer; None when nothing fits."""
        return max((c for c in self.candidates() if c.fits), key=lambda c: c.rank, default=None)


# -- problems

SMALL = st.integers(0, 3).map(lambda number: number * GRAIN)
COSTS = st.none() | st.builds(
    lambda *moments: PhaseCost(moments_bytes=moments),
    SMALL.map(constant),
    SMALL.map(lambda size: size // 8 * variable("text_tokens")),
)


@st.composite
def groups(draw: st.DrawFn, index: int) -> ModuleGroup:
    return ModuleGroup(
        id=f"g{index}",
        modules=(f"g{index}",),
        role="decoder_layer",
        weight_bytes=draw(st.integers(0, 6)) * GRAIN,
        num_parameters=1,
        kv_bytes_per_position=draw(st.sampled_from([0, GRAIN // 2, GRAIN, 3 * GRAIN // 2, MIB])),
        buffer_bytes=constant(draw(SMALL)),
        logits_bytes=draw(SMALL) * variable("batch"),
        encode=draw(COSTS),
        prefill=draw(COSTS),
        decode=draw(COSTS),
    )


@st.composite
def flows(draw: st.DrawFn, count: int) -> Flow:
    readers = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True))
    producer = draw(st.sampled_from([INPUTS, f"g{min(readers)}"]))
    return Flow(
        tensor="shared",
        producer=producer,
        consumers=tuple(f"g{reader}" for reader in sorted(readers)),
        phase=draw(st.sampled_from(PHASES)),
        num_bytes=constant(draw(SMALL)),
        lasting=draw(st.booleans()),
        is_buffer=draw(st.booleans()),
    )


@st.composite
def intervals(draw: st.DrawFn, count: int) -> Interval:
    """What the running group holds includes the copies that arrived there."""
    names = [f"g{i}" for i in range(count)]
    running = draw(st.sampled_from(names))
    arrived = draw(st.dictionaries(st.sampled_from(names), SMALL.map(lambda size: 4 * size), max_size=2))
    arrived.pop(running, None)
    held = draw(st.dictionaries(st.sampled_from(names), SMALL, max_size=3))
    held[running] = held.get(running, 0) + sum(arrived.values())
    return interval(running, held, arrived)


def interval(running: str, held: Mapping[str, int], arrived: Mapping[str, int]) -> Interval:
    return Interval(
        phase="decode",
        running=running,
        held=tuple((name, (constant(num_bytes // 2), constant(num_bytes))) for name, num_bytes in held.items()),
        arrived=tuple((name, constant(num_bytes)) for name, num_bytes in arrived.items()),
    )


DEVICES = st.builds(
    lambda index, grains, context, reserve: Device(
        index=index,
        memory_bytes=WORKSPACE_BYTES + grains * GRAIN,
        context_bytes=context * GRAIN,
        reserve_bytes=reserve * GRAIN,
    ),
    index=st.just(0),
    grains=st.sampled_from([40, 40, 24, 24, 60, 60, 80, 12, 12, 1]),
    context=st.integers(0, 1),
    reserve=st.integers(0, 1),
)
MACHINES = (
    st.sampled_from([3, 2, 1])
    .flatmap(lambda count: st.lists(DEVICES, min_size=count, max_size=3))
    .map(lambda devices: Machine(devices=tuple(replace(device, index=i) for i, device in enumerate(devices))))
)


@st.composite
def questions(draw: st.DrawFn, pins: bool = True, max_groups: int = 8) -> Question:
    count = draw(st.integers(1, max_groups))
    names = [f"g{i}" for i in range(count)]
    pairs = st.lists(st.sampled_from(names), min_size=min(2, count), max_size=2, unique=True)
    fusion = st.builds(
        Fusion, op=st.just("cat"), operands=pairs.map(tuple), reason=st.just("joined"), hard=st.booleans()
    )
    machine = draw(MACHINES)
    device = st.integers(0, len(machine.devices) - 1)
    return Question(
        graph=ModuleGraph(
            name="toy",
            dtype="float16",
            groups=tuple(draw(groups(i)) for i in range(count)),
            flows=tuple(draw(st.lists(flows(count), max_size=4))),
            fusions=tuple(draw(st.lists(fusion, max_size=2))),
            intervals=tuple(draw(st.lists(intervals(count), max_size=3))),
        ),
        machine=machine,
        quantities=Quantities(
            batch=draw(st.integers(1, 2)),
            images=1,
            patches=5,
            text_tokens=8,
            image_tokens=4,
            positions=draw(st.integers(0, 2)),
        ),
        constraints=Constraints(
            pins=draw(st.dictionaries(st.sampled_from(names), device, max_size=2)) if pins else {},
            split_vision=draw(st.booleans()),
        ),
    )


def answer(question: Question) -> Solution | None:
    """The solver's solution, or None where pins exclude every placement."""
    try:
        return chain_dp.solve(question.problem)
    except ConstraintError:
        return None


def plain(solution: Solution) -> tuple[Stage, ...]:
    return tuple((stage.device, stage.members) for stage in solution.stages)


# -- degenerate cases


def one_group(weight_bytes: int, kv_bytes_per_position: int = 0) -> ModuleGraph:
    group = ModuleGroup(
        id="all",
        modules=("all",),
        role="decoder_layer",
        weight_bytes=weight_bytes,
        num_parameters=1,
        kv_bytes_per_position=kv_bytes_per_position,
    )
    return ModuleGraph(name="one", dtype="float16", groups=(group,))


def devices(*capacities: int) -> Machine:
    """Devices that hold exactly so many bytes beside the workspace."""
    return Machine(
        devices=tuple(
            Device(index=i, memory_bytes=WORKSPACE_BYTES + capacity, context_bytes=0, reserve_bytes=0)
            for i, capacity in enumerate(capacities)
        )
    )


def chain(*sizes: int, kv: int = 0) -> ModuleGraph:
    """One group per size, each with the same KV cache."""
    groups = [replace(one_group(size, kv).groups[0], id=f"g{i}", modules=(f"g{i}",)) for i, size in enumerate(sizes)]
    return ModuleGraph(name="chain", dtype="float16", groups=tuple(groups))


def solve(graph: ModuleGraph, machine: Machine, positions: int = 0, **pins: int) -> Solution:
    counts = Quantities(batch=1, images=0, patches=0, text_tokens=1, image_tokens=0, positions=positions)
    return chain_dp.solve(Problem.of(graph, machine, counts, Constraints(pins=pins)))


def test_one_group_that_fits_one_device_exactly_is_placed() -> None:
    solution = solve(one_group(100), devices(100))
    assert (solution.status, plain(solution)) == ("OPTIMAL", ((0, (0,)),))


def test_one_byte_less_is_infeasible() -> None:
    solution = solve(one_group(100), devices(99))
    assert (solution.status, plain(solution)) == ("INFEASIBLE", ((0, (0,)),))


def test_kv_positions_are_counted_to_the_last_byte() -> None:
    graph = one_group(100, kv_bytes_per_position=10)
    extras = [solve(graph, devices(100 + spare), positions=3).extra_positions for spare in (30, 39, 40, 59, 60)]
    assert extras == [0, 0, 1, 2, 3]


def test_one_group_on_many_devices_uses_one_of_them() -> None:
    assert plain(solve(one_group(100), devices(100, 100, 100))) == ((0, (0,)),)
    assert plain(solve(one_group(100), devices(99, 100, 99))) == ((1, (0,)),)


def test_a_model_without_kv_cache_is_bounded_by_nothing() -> None:
    solution = solve(chain(5, 5), devices(10, 10))
    assert solution.extra_positions == ANY_KV and evaluate_positions(solution, chain(5, 5), devices(10, 10)) is None


def evaluate_positions(solution: Solution, graph: ModuleGraph, machine: Machine) -> int | None:
    counts = Quantities(batch=1, images=0, patches=0, text_tokens=1, image_tokens=0, positions=0)
    return evaluate(Problem.of(graph, machine, counts), solution.stages).kv_positions


def test_equal_groups_on_equal_devices_are_split_in_the_middle() -> None:
    assert plain(solve(chain(10, 10, 10, 10, kv=1), devices(50, 50))) == ((0, (0, 1)), (1, (2, 3)))


def test_unequal_devices_are_filled_by_what_remains_for_the_cache() -> None:
    """On 100 + 40 bytes: three groups and one leave 70 // 3 = 23 and 30 // 1 = 30; two and two only 20 // 2 = 10."""
    solution = solve(chain(10, 10, 10, 10, kv=1), devices(100, 40))
    assert (plain(solution), solution.extra_positions) == (((0, (0, 1, 2)), (1, (3,))), 23)


def test_no_device_stays_empty_while_a_legal_split_exists() -> None:
    assert len(solve(chain(1, 1, 1), devices(100, 100, 100)).stages) == 3
    assert len(solve(chain(1, 1, 1), devices(100, 100, 0)).stages) == 2


def test_a_large_device_may_come_after_a_small_one() -> None:
    assert plain(solve(chain(10, 30), devices(30, 10))) == ((1, (0,)), (0, (1,)))


def test_a_pinned_group_stays_on_its_device() -> None:
    assert plain(solve(chain(10, 10), devices(50, 50), g0=1)) == ((1, (0,)), (0, (1,)))


def test_pins_that_leave_no_contiguous_stages_are_refused() -> None:
    with pytest.raises(ConstraintError, match="the pins leave no legal placement, whatever the memory: a device holds"):
        solve(chain(1, 1, 1), devices(50, 50), g0=0, g1=1, g2=0)


def test_the_nearest_misfit_lacks_as_little_as_possible_on_its_worst_device() -> None:
    """30 + 10 on 20 + 15: together they lack 20 or 25, apart at least 10."""
    solution = solve(chain(30, 10), devices(20, 15))
    assert (solution.status, plain(solution)) == ("INFEASIBLE", ((0, (0,)), (1, (1,))))


def test_a_stage_that_shrinks_when_its_sender_joins_it_is_not_cut_in_two() -> None:
    """While a runs it holds 100 bytes, half of them a copy from b: alone it needs 110, with b 60, on 70."""
    graph = replace(chain(10, 0), intervals=(interval("g0", {"g0": 100}, {"g1": 50}),))
    assert plain(solve(graph, devices(70, 70))) == ((0, (0, 1)),)


# -- the oracle on made-up problems


@oracle
@given(questions())
def test_the_solver_equals_brute_force(question: Question) -> None:
    best, solution = question.best(), answer(question)
    if best is None:
        assert solution is None or solution.status == "INFEASIBLE"
        return
    assert solution is not None and solution.status == "OPTIMAL"
    assert len(solution.stages) == len(best.stages)
    assert solution.extra_positions == best.extra_positions == solution.bound
    assert question.candidate(plain(solution)).free_fraction == best.free_fraction
    assert plain(solution) == best.stages


@briefly
@given(questions(max_groups=5))
def test_pins_that_no_placement_can_keep_are_refused_and_only_those(question: Question) -> None:
    assert (answer(question) is None) == (not list(question.candidates()))


@settings(briefly, max_examples=40)
@given(questions(pins=False))
def test_where_nothing_fits_the_nearest_misfit_is_returned(question: Question) -> None:
    assume(question.best() is None)
    solution = chain_dp.solve(question.problem)
    least = min(max(-left for left in candidate.left_bytes) for candidate in question.candidates())
    assert (solution.status, solution.extra_positions) == ("INFEASIBLE", 0)
    assert max(-left for left in question.candidate(plain(solution)).left_bytes) == least > 0


@briefly
@given(questions())
def test_the_solution_keeps_every_constraint_and_the_evaluator_agrees(question: Question) -> None:
    solution = answer(question)
    assume(solution is not None and solution.status == "OPTIMAL")
    assert solution is not None
    stages, evaluation = plain(solution), evaluate(question.problem, solution.stages)
    assert sorted(member for _, members in stages for member in members) == list(range(len(question.graph.groups)))
    assert len({device for device, _ in stages}) == len(stages)
    assert question.keeps_pins(stages)
    assert all(any(set(unit) <= set(members) for _, members in stages) for unit in question.units)
    used = dict(stages)
    for position, (device, peak) in enumerate(zip(question.machine.devices, evaluation.memory, strict=True)):
        left = question.left_bytes(device, used[position]) if position in used else device.memory_bytes
        assert device.memory_bytes - peak.total_bytes == left >= 0
    unbounded = solution.extra_positions == ANY_KV
    assert evaluation.kv_positions == (None if unbounded else question.quantities.positions + solution.extra_positions)


@briefly
@given(questions(), st.integers(0, 2), st.integers(1, 20))
def test_more_memory_never_uses_fewer_devices_nor_for_as_many_holds_less(
    question: Question, device: int, grains: int
) -> None:
    """The pair (devices used, objective) never falls. The objective alone may: see the next test."""
    assume(device < len(question.machine.devices))
    enlarged = list(question.machine.devices)
    enlarged[device] = replace(enlarged[device], memory_bytes=enlarged[device].memory_bytes + grains * GRAIN)
    before, after = answer(question), answer(replace(question, machine=Machine(devices=tuple(enlarged))))
    assume(before is not None and before.status == "OPTIMAL")
    assert before is not None and after is not None and after.status == "OPTIMAL"
    score = [(len(solution.stages), solution.extra_positions) for solution in (before, after)]
    assert score[0] <= score[1]


def test_a_device_that_becomes_just_large_enough_is_used_even_where_that_costs_positions() -> None:
    """Two groups of 10 bytes, 1 byte per position each: alone, the first device holds (100 - 20) // 2 = 40."""
    graph = chain(10, 10, kv=1)
    without, with_it = solve(graph, devices(100, 9)), solve(graph, devices(100, 10))
    assert (len(without.stages), without.extra_positions) == (1, 40)
    assert (len(with_it.stages), with_it.extra_positions) == (2, 0)


@briefly
@given(questions(), st.permutations(range(3)))
def test_renaming_devices_changes_neither_feasibility_nor_any_value(question: Question, order: list[int]) -> None:
    order = [position for position in order if position < len(question.machine.devices)]
    moved = Machine(
        devices=tuple(replace(question.machine.devices[old], index=new) for new, old in enumerate(order)),
    )
    pins = {name: order.index(device) for name, device in question.constraints.pins.items()}
    renamed = replace(question, machine=moved, constraints=replace(question.constraints, pins=pins))
    before, after = answer(question), answer(renamed)
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert (before.status, before.extra_positions) == (after.status, after.extra_positions)
        fractions = [q.candidate(plain(s)).free_fraction for q, s in ((question, before), (renamed, after))]
        assert before.status == "INFEASIBLE" or fractions[0] == fractions[1]


@briefly
@given(questions(), st.permutations(["rtx4090", "l4", None]))
def test_what_distinguishes_devices_of_equal_memory_does_not_move_anything(
    question: Question, kinds: list[str | None]
) -> None:
    marked = Machine(
        devices=tuple(
            replace(d, kind=kind, uuid=kind) for d, kind in zip(question.machine.devices, kinds, strict=False)
        )
    )
    before, after = answer(question), answer(replace(question, machine=marked))
    assert before == after


# -- the oracle on the real model


@pytest.mark.parametrize(
    ("spec", "workload"),
    [
        ("24GiB,12GiB,8GiB", Workload()),
        ("8GiB,24GiB,12GiB", Workload(batch_size=2, max_model_len=8192)),
        ("3x12GiB", Workload(num_images=0)),
        ("a100-40g,t4", Workload(new_tokens=20_000)),
    ],
    ids=["falling", "mixed", "equal", "two"],
)
def test_the_solver_equals_brute_force_on_the_real_model(spec: str, workload: Workload) -> None:
    model, machine = find_model("internlm-xcomposer2-vl-7b"), Machine.parse(spec)
    resolved = model.resolved(workload)
    problem = Problem.of(model.graph(resolved), machine, model.quantities(resolved))
    solution = chain_dp.solve(problem)
    score, stages = best_by_evaluator(problem)
    assert (len(solution.stages), solution.extra_positions) == score[:2]
    assert tuple((stage.device, len(stage.members)) for stage in solution.stages) == stages


def best_by_evaluator(problem: Problem) -> tuple[tuple[Any, ...], tuple[tuple[int, int], ...]]:
    """The best score and its (device, number of groups) per stage, over every placement of the problem's units."""
    units, machine = problem.units, problem.machine.devices
    runs = {}
    for start, end in combinations(range(len(units) + 1), 2):
        members = tuple(sorted(member for unit in units[start:end] for member in unit.members))
        kv = sum(problem.table.loads[member].kv_bytes_per_position for member in members)
        left = [device.memory_bytes - problem.table.on_device(members, device).total_bytes for device in machine]
        runs[start, end] = (left, kv, len(members))
    best: tuple[Any, ...] = ()
    for num_stages in range(1, len(machine) + 1):
        for cuts in combinations(range(1, len(units)), num_stages - 1):
            stages = [runs[run] for run in zip((0, *cuts), (*cuts, len(units)), strict=True)]
            for chosen in permutations(range(len(machine)), num_stages):
                lefts = [left[device] for device, (left, _, _) in zip(chosen, stages, strict=True)]
                if min(lefts) >= 0:
                    extra = min(b // kv for b, (_, kv, _) in zip(lefts, stages, strict=True) if kv)
                    free = min(Fraction(b, machine[d].memory_bytes) for b, d in zip(lefts, chosen, strict=True))
                    tie = tuple((-device, stage[2]) for device, stage in zip(chosen, stages, strict=True))
                    best = max(best, (num_stages, extra, free, tie))
    return best[:3], tuple((-device, length) for device, length in best[3])
