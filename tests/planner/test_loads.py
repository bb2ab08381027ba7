"""All runs at once take what one stage after the other takes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.constraints import Unit
from planner.graph import Tie
from planner.memory import CostTable, StageLoad
from planner.polynomial import Quantities
from planner.solve.loads import BEYOND_BYTES, run_loads
from planner.units import MIB
from tests.planner.test_chain_dp import Question, chain, questions


@settings(derandomize=True, deadline=None, max_examples=80)
@given(questions(pins=False), st.integers(-1, 7), st.booleans())
def test_every_run_takes_what_its_groups_take_as_a_stage(question: Question, aside: int, tied: bool) -> None:
    graph = question.graph
    ends = dict.fromkeys((graph.groups[0].id, graph.groups[-1].id))
    ties = (Tie(groups=tuple(ends), num_bytes=MIB, num_parameters=1),) if tied else ()
    groups = tuple(replace(group, loading_bytes=index % 3 * 5 * MIB) for index, group in enumerate(graph))
    table = CostTable.of(replace(graph, groups=groups, ties=ties), question.quantities)
    units = question.problem.units
    carried = units[aside].members if 0 <= aside < len(units) - 1 else ()
    kept = [unit for unit in units if unit.members != carried]
    found = run_loads(table, kept, carried)
    for start in range(len(kept)):
        stage = StageLoad(table)
        for member in carried:
            stage.add(member)
        for end in range(start, len(kept) + 1):
            for member in kept[end - 1].members if end > start else ():
                stage.add(member)
            assert found.running_bytes[start, end] == stage.running_bytes
            assert found.loading_bytes[start, end] == stage.loading_bytes
            assert found.kv_bytes_per_position[start, end] == stage.kv_bytes_per_position


def test_loads_beyond_64_bits_count_as_more_than_any_machine_holds() -> None:
    counts = Quantities(batch=10**12, images=0, patches=0, text_tokens=1, image_tokens=0, positions=10**12)
    table = CostTable.of(chain(1, 1, kv=10**6), counts)
    found = run_loads(table, [Unit(members=(0,)), Unit(members=(1,))], ())
    assert found.running_bytes[0].tolist() == [0, BEYOND_BYTES, BEYOND_BYTES]
