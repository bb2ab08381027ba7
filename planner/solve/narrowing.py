"""Placements between links that differ: searches that know more and more of where units are.

A search prices what it does not know by the best link there is, so what it finds may cost more than it thought, or use
a forbidden link. Then it is made again in cases: by the places that the unit may be at that hides most, or by whether a
tensor reaches the slow end it hides. The most promising case is looked at next, until a placement costs what its search
thought and no other case thinks of a better one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from planner.problem import TIMED, Evaluation, PlacedStage, devices_by_group, evaluate, ranked
from planner.solve.crossings import NOTHING_KNOWN, Known
from planner.solve.search import ANY_TIME, Thought, Within
from planner.solve.segments import Segments

MAX_SEARCHES = 128
"""Searches after which the best placement is taken as it is, with its distance from what is possible."""

Stages = tuple[PlacedStage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A placement, and the best value of any on as many devices, or of any at all where the objective is timed.

    `is_allowed` says that it keeps off forbidden links; where it does not, none was found that does. `is_finished` says
    that there is no better one.
    """

    bound: int
    stages: Stages
    is_allowed: bool
    is_finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a search is to go by; if `is_rough`, any placement of the best value will do."""

    known: Known
    within: Within = ANY_TIME
    is_rough: bool = False


@dataclass(order=True, frozen=True, slots=True)
class _Open:
    """A case that may hold something better than was found; its best placement ranks no better than `key`."""

    key: tuple[float, ...]
    number: int
    thought: Thought = field(compare=False)
    evaluation: Evaluation = field(compare=False)
    asked: Asked = field(compare=False)


def best_between_links(segments: Segments, search: Callable[[Asked], Thought | None]) -> Found | None:
    """The best placement that `search` leads to, in as many cases as links make necessary; None where it finds none."""
    tree = _Tree(segments, search)
    tree.look(NOTHING_KNOWN)
    return tree.found()


class _Tree:
    """The searches made, the cases that may still hold something better, and the best placement so far."""

    def __init__(self, segments: Segments, search: Callable[[Asked], Thought | None]) -> None:
        self._segments = segments
        self._problem = segments.problem
        self._is_timed = segments.problem.objective in TIMED
        # Telling equal pipelines apart takes as long as finding one, and most are not the last.
        self._may_be_rough = segments.problem.objective == "throughput" and segments.num_link_groups > 1
        self._search = search
        self._open: list[_Open] = []
        self._num_searches = 0
        self._best: Stages | None = None
        self._best_ranks: tuple[float, ...] = ()

    def look(self, known: Known, low_ns: int = 0, *, is_final: bool = False) -> None:
        """Search a case whose value is known to be no lower; `is_final` tells equal placements apart."""
        self._num_searches += 1
        high_ns = int(self._best_ranks[0]) if self._best_ranks and self._is_timed else ANY_TIME.high_ns
        within = Within(low_ns=low_ns, high_ns=high_ns)
        asked = Asked(known=known, within=within, is_rough=self._may_be_rough and not is_final)
        thought = self._search(asked)
        if thought is None:
            return
        bound, stages = thought
        evaluation = evaluate(self._problem, stages)
        ranks = ranked(self._problem, stages, evaluation)
        goal = (bound,) if self._is_timed else (ranks[0], -bound)
        key = goal if asked.is_rough else (*goal, *ranks[len(goal) :])
        heappush(self._open, _Open(key, self._num_searches, thought, evaluation, asked))
        if self._is_allowed(stages) and (self._best is None or ranks < self._best_ranks):
            self._best, self._best_ranks = stages, ranks

    def found(self) -> Found | None:
        """The best placement after as many searches as it takes."""
        first = self._open[0] if self._open else None
        while self._is_unfinished and self._num_searches < MAX_SEARCHES:
            self._split(heappop(self._open))
        if first is None:
            return None
        if self._best is None:
            bound, stages = first.thought
            return Found(bound=bound, stages=stages, is_allowed=False, is_finished=not self._open)
        value = evaluate(self._problem, self._best).value(self._problem)
        assert value is not None  # timed objectives were refused without speeds
        thoughts = (one.thought for one in self._open)
        rivals = [bound for bound, stages in thoughts if self._is_timed or len(stages) == len(self._best)]
        bound = min([value, *rivals]) if self._is_timed else max([value, *rivals])
        return Found(bound=bound, stages=self._best, is_allowed=True, is_finished=not self._is_unfinished)

    @property
    def _is_unfinished(self) -> bool:
        """Whether a case that is still open may hold something better than the best placement."""
        return bool(self._open) and (self._best is None or self._open[0].key < self._best_ranks)

    def _split(self, one: _Open) -> None:
        """Search in cases, or once more for the best of equal placements."""
        low_ns = one.thought[0] if self._is_timed else 0
        cases = self._cases(one)
        for known in cases:
            self.look(known, low_ns)
        if not cases and one.asked.is_rough:
            self.look(one.asked.known, low_ns, is_final=True)

    def _cases(self, one: _Open) -> list[Known]:
        bound, stages = one.thought
        devices, known = devices_by_group(stages), one.asked.known
        if self._segments.blocks and (cases := self._cases_of_blocks(devices, known)):
            return cases
        if self._segments.crossings is None or not self._is_timed or one.evaluation.times is None:
            return []
        binding = {device for device, spent_ns in one.evaluation.times.stage_ns.items() if spent_ns > bound}
        once = self._problem.objective == "latency"
        return self._segments.crossings.narrowed(known).cases(devices, binding, once=once)

    def _cases_of_blocks(self, devices: Sequence[int], known: Known) -> list[Known]:
        every: Container[int] = range(len(self._problem.machine.devices))
        return self._segments.blocks.narrowed(known).cases(devices, every, once=False) if self._segments.blocks else []

    def _is_allowed(self, stages: Stages) -> bool:
        times = self._segments.times
        return self._segments.blocks is None or not (times and times.forbidden_copies(devices_by_group(stages)))
