"""What a pipeline's stages cost: a plan's stages under the time model, and how many groups to keep in flight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.errors import ConstraintError
from planner.graph import Phase
from planner.plan import Boundary, Plan, Stage, device_key
from planner.problem import PlacedStage, Problem
from planner.schedule import Schedule, StageCost, simulate
from planner.timing import NS_PER_S, at_average_length, group_seconds, link_between, transfer_ns

MAX_SLOTS_PER_STAGE = 4
"""Groups in flight per stage. While prompts go through, stages wait for each other: the more prompts in a row, the
smaller is that share. From four on it is small, and answers only take longer."""
SLOTS_WITHOUT_ESTIMATE = 2
"""Per stage, where no device's speed is known."""
NUM_SIMULATED_STEPS = 32
"""Tokens per answer in the simulations that groups are chosen by: the share of prompts matters, not the length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How requests are grouped: so many at a time go through the stages together, in so many slots.

    Raises: ConstraintError for less than one of either.
    """

    num_slots: int
    batch_size: int

    def __post_init__(self) -> None:
        if min(self.num_slots, self.batch_size) < 1:
            raise ConstraintError(f"{self.num_slots} groups of {self.batch_size}: at least one of one is needed")

    @property
    def num_requests(self) -> int:
        """Requests in flight."""
        return self.num_slots * self.batch_size


def with_costs(
    problem: Problem, placed: Sequence[PlacedStage], stages: Sequence[Stage], boundaries: Sequence[Boundary]
) -> tuple[Stage, ...]:
    """The stages with what a batch costs each; as they are where a device's speed is unknown."""
    costs = [_cost(problem, one, boundaries) for one in placed]
    if any(cost is None for cost in costs):
        return tuple(stages)
    return tuple(replace(stage, cost=cost) for stage, cost in zip(stages, costs, strict=True))


def groups_for(plan: Plan) -> Groups:
    """The groups with the most tokens per second by the plan's estimate, within what its memory holds.

    Without an estimate two slots a stage, as far as whole batches fit. A group is never larger than the planned batch,
    whose activations the plan counts; all groups together hold no more KV positions than fit.
    """
    num_stages, batch = len(plan.stages), plan.workload.batch_size
    in_flight = most_in_flight(plan)
    fewest, most = (min(in_flight, factor * num_stages) for factor in (1, MAX_SLOTS_PER_STAGE))
    choices = [
        Groups(num_slots=slots, batch_size=min(batch, in_flight // slots))
        for slots in range(fewest, most + 1, max(num_stages // 2, 1))
    ]
    if plan.schedule_costs is None:
        enough = [one for one in choices if one.num_slots <= SLOTS_WITHOUT_ESTIMATE * num_stages]
        return max(enough, key=lambda groups: (groups.batch_size, groups.num_slots))
    return max(choices, key=lambda groups: (_tokens_per_s(plan, groups), -groups.num_slots))


def most_in_flight(plan: Plan) -> int:
    """Requests whose KV positions fit beside what the plan keeps in memory; never fewer than planned."""
    batch = plan.workload.batch_size
    room = batch if plan.kv_tokens is None else batch * plan.kv_tokens // max(plan.quantities.positions, 1)
    return max(batch, room)


def refuse_unplanned_groups(plan: Plan, groups: Groups) -> None:
    """Raise ConstraintError for groups beyond the planned batch, or more of them than fit."""
    batch, most = plan.workload.batch_size, most_in_flight(plan)
    if groups.batch_size > batch:
        raise ConstraintError(
            f"groups of {groups.batch_size}: the plan is for {batch} at once. Plan again with --batch-size "
            f"{groups.batch_size}"
        )
    if groups.num_requests > most:
        raise ConstraintError(
            f"{groups.num_slots} groups of {groups.batch_size} are {groups.num_requests} requests in flight, and the "
            f"plan's memory holds the KV cache of {most}: ask for fewer --groups, or a smaller --group-size"
        )


def planned_schedule(plan: Plan, groups: Groups, num_groups: int, num_steps: int) -> Schedule | None:
    """The simulation of so many equal groups by the plan's estimate; None without one."""
    costs = plan.schedule_costs
    if costs is None:
        return None
    share = groups.batch_size / plan.workload.batch_size
    return simulate([_for_share(cost, share) for cost in costs], [num_steps] * num_groups, groups.num_slots)


def _tokens_per_s(plan: Plan, groups: Groups) -> float:
    num_steps = min(plan.workload.new_tokens, NUM_SIMULATED_STEPS)
    schedule = planned_schedule(plan, groups, 2 * groups.num_slots, num_steps)
    assert schedule is not None, "only plans with costs are simulated"
    return 2 * groups.num_slots * num_steps * groups.batch_size / schedule.makespan_s


def _for_share(cost: StageCost, share: float) -> StageCost:
    """The cost of a part of the batch: pictures and prompts take that part, a step reads all weights whatever it is."""
    return StageCost(
        encode_s=cost.encode_s * share,
        prefill_s=cost.prefill_s * share,
        decode_s=cost.decode_s,
        send_prefill_s=cost.send_prefill_s * share,
        send_decode_s=cost.send_decode_s,
    )


def _cost(problem: Problem, placed: PlacedStage, boundaries: Sequence[Boundary]) -> StageCost | None:
    encode_s, prefill_s = _phase_s(problem, placed, "encode"), _phase_s(problem, placed, "prefill")
    decode_s = _phase_s(problem, placed, "decode")
    if encode_s is None or prefill_s is None or decode_s is None:
        return None
    return StageCost(
        encode_s=encode_s,
        prefill_s=prefill_s,
        decode_s=decode_s,
        send_prefill_s=_send_s(problem, placed, boundaries, ("encode", "prefill")),
        send_decode_s=_send_s(problem, placed, boundaries, ("decode",)),
    )


def _phase_s(problem: Problem, placed: PlacedStage, phase: Phase) -> float | None:
    device = problem.machine.devices[placed.device]
    quantities = problem.quantities
    if phase == "decode":
        quantities = at_average_length(quantities, problem.new_tokens)
    total_s = 0.0
    for member in placed.members:
        cost = problem.graph.groups[member].cost(phase)
        seconds = group_seconds(cost, quantities, device) if cost else 0.0
        if seconds is None:
            return None
        total_s += seconds
    return total_s


def _send_s(problem: Problem, placed: PlacedStage, boundaries: Sequence[Boundary], phases: Sequence[Phase]) -> float:
    """Seconds for all that leaves a stage in these phases, over the links it takes."""
    machine = problem.machine
    position = {device_key(machine, index): index for index in range(len(machine.devices))}
    return sum(
        transfer_ns(one.num_bytes, link_between(machine, placed.device, position[one.target])) / NS_PER_S
        for one in boundaries
        if one.phase in phases and position[one.source] == placed.device
    )
