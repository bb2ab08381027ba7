"""Placements between links that differ: searches in which units are held to fewer and fewer places.

A search prices what it does not know by the best link there is, so what it finds may cost more than it thought, or use
a forbidden link. Then the unit whose place hides most is held to one link group after the other, and the most promising
of these searches is looked at next. It ends where a placement costs what a search thought: no other is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from planner.problem import TIMED, PlacedStage, devices_by_group, evaluate, rank
from planner.solve.crossings import ANYWHERE, Places
from planner.solve.segments import Segments

MAX_SEARCHES = 128
"""Searches after which the best placement is taken as it is, with its distance from what is possible."""

Stages = tuple[PlacedStage, ...]
Thought = tuple[int, Stages]
"""The best value that a search thought possible, and its placement."""


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


@dataclass(order=True, frozen=True, slots=True)
class _Open:
    """A search that found what may be better than it is; the best of its placements ranks no better than `key`."""

    key: tuple[float, ...]
    number: int
    bound: int = field(compare=False)
    stages: Stages = field(compare=False)
    places: Places = field(compare=False)


def best_between_links(segments: Segments, search: Callable[[Places], Thought | None]) -> Found | None:
    """The best placement that `search` leads to, narrowed as far as links make necessary; None where it finds none."""
    tree = _Tree(segments, search)
    tree.look(ANYWHERE)
    return tree.found()


class _Tree:
    """The searches made, those that may still lead to something better, and the best placement so far."""

    def __init__(self, segments: Segments, search: Callable[[Places], Thought | None]) -> None:
        self._segments = segments
        self._problem = segments.problem
        self._search = search
        self._open: list[_Open] = []
        self._num_searches = 0
        self._best: Stages | None = None

    def look(self, places: Places) -> None:
        """Search with units at these places."""
        self._num_searches += 1
        thought = self._search(places)
        if thought is None:
            return
        bound, stages = thought
        ranks = rank(self._problem, stages)
        goal = (bound,) if self._problem.objective in TIMED else (ranks[0], -bound)
        key = (*goal, *ranks[len(goal) :])
        heappush(self._open, _Open(key, self._num_searches, bound, stages, places))
        if self._is_allowed(stages) and (self._best is None or ranks < rank(self._problem, self._best)):
            self._best = stages

    def found(self) -> Found | None:
        """The best placement after as many searches as it takes."""
        first = self._open[0] if self._open else None
        while self._is_unfinished and self._num_searches < MAX_SEARCHES:
            self._narrow(heappop(self._open))
        if first is None:
            return None
        if self._best is None:
            return Found(bound=first.bound, stages=first.stages, is_allowed=False, is_finished=not self._open)
        value = evaluate(self._problem, self._best).value(self._problem)
        assert value is not None  # timed objectives were refused without speeds
        is_timed = self._problem.objective in TIMED
        rivals = [one.bound for one in self._open if is_timed or len(one.stages) == len(self._best)]
        bound = min([value, *rivals]) if is_timed else max([value, *rivals])
        return Found(bound=bound, stages=self._best, is_allowed=True, is_finished=not self._is_unfinished)

    @property
    def _is_unfinished(self) -> bool:
        """Whether a search that is still open thought of something better than the best placement."""
        return bool(self._open) and (self._best is None or self._open[0].key < rank(self._problem, self._best))

    def _narrow(self, one: _Open) -> None:
        """Search with the unit that hides most at each of its places."""
        devices = devices_by_group(one.stages)
        unit = self._doubt(one, devices)
        if unit is None:  # sums of which only some bits decide may differ in their last ones
            return
        for group in sorted(one.places.get(unit, frozenset(range(self._segments.num_link_groups)))):
            self.look({**one.places, unit: frozenset({group})})

    def _doubt(self, one: _Open, devices: Sequence[int]) -> int | None:
        timed, blocks = self._segments.crossings, self._segments.blocks
        unit = blocks.narrowed(one.places).doubt(devices, once=False) if blocks else None
        if unit is not None or timed is None or self._problem.objective not in TIMED:
            return unit
        return timed.narrowed(one.places).doubt(devices, once=self._problem.objective == "latency")

    def _is_allowed(self, stages: Stages) -> bool:
        times = self._segments.times
        return self._segments.blocks is None or not (times and times.forbidden_copies(devices_by_group(stages)))
