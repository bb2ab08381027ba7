"""A pipeline's schedule as a value: which stage works on what, when; simulated from costs, or measured.

Groups of requests take turns in a fixed number of slots, one step of each: the prompt (with its pictures), then a token
per step. Every stage takes the turns in the same order, so a schedule follows from costs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from planner.graph import Phase

IDLE = "·"
MARKS: dict[Phase, str] = {
    "encode": "#",
    "prefill": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "decode": "abcdefghijklmnopqrstuvwxyz",
}
"""How a chart shows work: pictures, and the prompt and the tokens of each group by a letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a stage does for one step of a group, without waiting; step 0 is the prompt."""

    stage: int
    group: int
    step: int
    phase: Phase
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Seconds that a stage needs for one group: its pictures, its prompt, each token; and to hand either on."""

    encode_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    send_prefill_s: float = 0.0
    send_decode_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Tasks of all stages. Raises: ValueError without any."""

    num_stages: int
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("a schedule has at least one task")

    @cached_property
    def start_s(self) -> float:
        """When the first task begins."""
        return min(task.start_s for task in self.tasks)

    @cached_property
    def makespan_s(self) -> float:
        """Seconds from the first beginning to the last end."""
        return max(task.end_s for task in self.tasks) - self.start_s

    def busy_s(self, stage: int) -> float:
        """Seconds that a stage works."""
        return sum(task.seconds for task in self.tasks if task.stage == stage)

    @property
    def bubble(self) -> float:
        """The idle share of all stages' time."""
        busy_s = sum(self.busy_s(stage) for stage in range(self.num_stages))
        return 1 - busy_s / (self.num_stages * self.makespan_s) if self.makespan_s else 0.0

    def chart(self, width: int = 100) -> str:
        """One line per stage, time from left to right: `#` pictures, capital letters prompts, small ones tokens."""
        title = max(len(f"stage {stage}") for stage in range(self.num_stages))
        room = width - title - 8
        lines = []
        for stage in range(self.num_stages):
            tasks = [task for task in self.tasks if task.stage == stage]
            share = self.busy_s(stage) / self.makespan_s if self.makespan_s else 1.0
            lines.append(f"{f'stage {stage}':<{title}}  {self._row(tasks, room)}  {share:>4.0%}")
        lines.append(f"{'':<{title}}  {self.makespan_s:.3g} s, bubble {self.bubble:.1%}")
        return "\n".join(lines)

    def _row(self, tasks: Sequence[Task], num_cells: int) -> str:
        """What fills most of each cell."""
        filled: list[dict[str, float]] = [{} for _ in range(num_cells)]
        cell_s = self.makespan_s / num_cells or 1.0
        for task in tasks:
            start, end = (task.start_s - self.start_s) / cell_s, (task.end_s - self.start_s) / cell_s
            for cell in range(int(start), min(int(end) + 1, num_cells)):
                part = min(end, cell + 1) - max(start, cell)
                mark = _mark(task)
                filled[cell][mark] = filled[cell].get(mark, 0.0) + part
        return "".join(_fullest(cell) for cell in filled)


def _fullest(cell: dict[str, float]) -> str:
    busy = sum(cell.values())
    return max(cell, key=lambda mark: cell[mark]) if busy > 0.5 else IDLE


def _mark(task: Task) -> str:
    marks = MARKS[task.phase]
    return marks[task.group % len(marks)]


def turns(num_steps: Sequence[int], num_slots: int) -> Iterator[tuple[int, int]]:
    """Group and step of every turn, for groups of these many steps: a free slot is taken by the next group."""
    waiting = iter(range(len(num_steps)))
    slots: list[tuple[int, int] | None] = [None] * max(num_slots, 1)
    open_slots = set(range(len(slots)))
    while open_slots:
        for place in sorted(open_slots):
            current = slots[place]
            if current is None or current[1] >= num_steps[current[0]]:
                group = next(waiting, None)
                if group is None:
                    open_slots.discard(place)
                    continue
                current = (group, 0)
            yield current
            slots[place] = (current[0], current[1] + 1)


def simulate(costs: Sequence[StageCost], num_steps: Sequence[int], num_slots: int) -> Schedule:
    """The schedule of groups of these many steps in so many slots, on stages of these costs.

    A stage begins a step when it is free and has what the stage before hands on; the first when the token before is
    known. Raises: ValueError without groups.
    """
    free = [0.0] * len(costs)
    known = [0.0] * len(num_steps)
    tasks: list[Task] = []
    for group, step in turns(num_steps, num_slots):
        arrives = known[group]
        for stage, cost in enumerate(costs):
            start = max(free[stage], arrives)
            work: list[tuple[Phase, float]] = [("decode", cost.decode_s)]
            if step == 0:
                work = [("encode", cost.encode_s), ("prefill", cost.prefill_s)]
            for phase, seconds in work:
                if seconds or phase != "encode":
                    task = Task(stage=stage, group=group, step=step, phase=phase, start_s=start, end_s=start + seconds)
                    tasks.append(task)
                    start = task.end_s
            free[stage] = start
            arrives = start + (cost.send_decode_s if step else cost.send_prefill_s)
        known[group] = free[-1]
    return Schedule(num_stages=len(costs), tasks=tuple(tasks))


def costs_of(schedule: Schedule, num_stages: int) -> tuple[StageCost, ...]:
    """The mean cost of every stage and phase in a measured schedule: what its simulation is made from."""

    def mean_s(stage: int, phase: Phase) -> float:
        found = [task.seconds for task in schedule.tasks if task.stage == stage and task.phase == phase]
        return sum(found) / len(found) if found else 0.0

    return tuple(
        StageCost(
            encode_s=mean_s(stage, "encode"), prefill_s=mean_s(stage, "prefill"), decode_s=mean_s(stage, "decode")
        )
        for stage in range(num_stages)
    )
