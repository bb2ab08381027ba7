"""Schedules: worked out by hand for a few stages and groups, drawn, and chosen by a plan's estimate."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner import ConstraintError, Machine, Plan, Workload
from planner.schedule import Schedule, StageCost, Task, costs_of, simulate, turns
from planner.stage_costs import Groups, groups_for, most_in_flight, planned_schedule, refuse_unplanned_groups
from vlm.model import find_model
from vlm.planning import plan_for


def test_groups_take_turns_and_the_next_one_takes_a_free_slot() -> None:
    assert list(turns([2, 3, 1], 2)) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (1, 2)]
    assert list(turns([2, 1], 1)) == [(0, 0), (0, 1), (1, 0)]
    assert list(turns([], 3)) == []


def test_two_equal_stages_with_two_groups_idle_at_both_ends_alone() -> None:
    cost = StageCost(prefill_s=1.0, decode_s=1.0)
    schedule = simulate([cost, cost], [4, 4], 2)
    # Nine steps from first to last: the second stage waits one, the first has nothing to do in the last.
    assert schedule.makespan_s == 9
    assert [schedule.busy_s(stage) for stage in range(2)] == [8, 8]
    assert schedule.bubble == pytest.approx(2 / 18)


def test_one_group_keeps_one_stage_busy_at_a_time() -> None:
    cost = StageCost(prefill_s=1.0, decode_s=1.0)
    assert simulate([cost] * 4, [5], 1).bubble == pytest.approx(0.75)


def test_pictures_and_messages_take_their_time() -> None:
    first = StageCost(encode_s=2.0, prefill_s=1.0, decode_s=0.5, send_prefill_s=0.25)
    schedule = simulate([first, StageCost(prefill_s=1.0, decode_s=0.5)], [2], 1)
    found = [(task.stage, task.phase, task.start_s, task.end_s) for task in schedule.tasks]
    assert found == [
        (0, "encode", 0.0, 2.0),
        (0, "prefill", 2.0, 3.0),
        (1, "prefill", 3.25, 4.25),
        (0, "decode", 4.25, 4.75),
        (1, "decode", 4.75, 5.25),
    ]


def test_a_chart_shows_who_does_what_when() -> None:
    cost = StageCost(encode_s=1.0, prefill_s=1.0, decode_s=1.0)
    chart = simulate([cost, replace(cost, encode_s=0.0)], [2, 2], 2).chart(width=15 + 7)
    assert chart.splitlines() == [
        "stage 0  #A#Bab·   86%",
        "stage 1  ··A·Bab   57%",
        "         7 s, bubble 28.6%",
    ]


def test_a_schedule_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a schedule has at least one task"):
        Schedule(num_stages=2, tasks=())


def test_a_simulation_from_a_schedules_mean_costs_is_that_schedule() -> None:
    costs = (StageCost(encode_s=0.5, prefill_s=2.0, decode_s=0.25), StageCost(prefill_s=1.0, decode_s=0.5))
    schedule = simulate(costs, [3, 4, 5], 2)
    assert costs_of(schedule, 2) == costs
    again = simulate(costs_of(schedule, 2), [3, 4, 5], 2)
    assert again == schedule


def test_tasks_on_one_stage_never_overlap() -> None:
    costs = [StageCost(prefill_s=0.7, decode_s=0.2), StageCost(prefill_s=0.3, decode_s=0.4, send_decode_s=0.1)]
    schedule = simulate(costs, [5, 2, 7, 3], 3)
    for stage in range(2):
        tasks: list[Task] = sorted((t for t in schedule.tasks if t.stage == stage), key=lambda task: task.start_s)
        assert all(before.end_s <= after.start_s for before, after in zip(tasks, tasks[1:], strict=False))


# -- of a plan


def planned(spec: str, batch_size: int) -> Plan:
    model = find_model("internlm-xcomposer2-vl-7b")
    return plan_for(model, Machine.parse(spec), Workload(batch_size=batch_size))


def test_a_plan_for_gpus_with_a_speed_says_what_each_stage_costs_and_keeps_it() -> None:
    plan = planned("2xrtx4090", 4)
    first, last = plan.schedule_costs or ()
    assert first.encode_s > 0 == last.encode_s
    assert first.prefill_s == pytest.approx(last.prefill_s, rel=0.05)
    # Nothing flows past the last stage but the logits, home.
    assert first.send_prefill_s > 10 * last.send_prefill_s
    assert Plan.from_yaml(plan.to_yaml()) == plan


def test_a_plan_without_speeds_has_no_costs_and_two_groups_a_stage() -> None:
    plan = planned("2x24GiB", 2)
    assert plan.schedule_costs is None
    assert "seconds" not in plan.to_yaml().partition("boundaries:")[0].partition("stages:")[2]
    assert groups_for(plan) == Groups(num_slots=4, batch_size=plan.workload.batch_size)
    assert planned_schedule(plan, groups_for(plan), 4, 8) is None


def test_groups_hold_no_more_positions_than_fit() -> None:
    plan = planned("2xrtx4090", 4)
    positions = plan.quantities.positions
    tight = replace(plan, kv_tokens=positions)
    groups = groups_for(tight)
    assert groups.num_slots * groups.batch_size <= 4
    assert groups.num_slots >= 2
    roomy = groups_for(plan)
    assert roomy.batch_size == 4
    assert roomy.num_slots * roomy.batch_size * positions <= 4 * (plan.kv_tokens or 0)


def test_a_batch_of_one_without_room_for_another_is_one_group() -> None:
    plan = planned("2xrtx4090", 1)
    assert groups_for(replace(plan, kv_tokens=plan.quantities.positions)) == Groups(num_slots=1, batch_size=1)


def test_between_hosts_handing_on_takes_longer() -> None:
    near, far = (planned(spec, 4).schedule_costs or () for spec in ("2xrtx4090", "a=rtx4090/b=rtx4090"))
    assert far[0].send_prefill_s > 5 * near[0].send_prefill_s
    assert far[0].send_decode_s > near[0].send_decode_s
    assert far[0].decode_s == near[0].decode_s


def test_groups_beyond_the_batch_or_beyond_memory_are_refused() -> None:
    plan = planned("2xrtx4090", 4)
    fits = most_in_flight(plan) // 4
    refuse_unplanned_groups(plan, Groups(num_slots=fits, batch_size=4))
    with pytest.raises(ConstraintError, match=f"holds the KV cache of {most_in_flight(plan)}: ask for fewer --groups"):
        refuse_unplanned_groups(plan, Groups(num_slots=fits + 1, batch_size=4))
    with pytest.raises(ConstraintError, match="groups of 5: the plan is for 4 at once. .* --batch-size 5"):
        refuse_unplanned_groups(plan, Groups(num_slots=1, batch_size=5))
    with pytest.raises(ConstraintError, match="0 groups of 4"):
        Groups(num_slots=0, batch_size=4)
