"""When a stage worked on what: tasks with their times, without the time spent waiting for other stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from planner.graph import Phase
from planner.schedule import Task


@dataclass(slots=True, kw_only=True)
class Clock:
    """Notes a stage's tasks, in seconds since `start`, which all stages call together: hosts have clocks of their own.

    A stage that `has_pictures_alone` runs no decoder layer: its prompts with pictures are nothing but encoding.
    """

    stage: int
    has_pictures_alone: bool = False
    tasks: list[Task] = field(default_factory=list)
    _zero_s: float = 0.0
    _waited_s: float = 0.0
    _waiting_since: float | None = None
    _pictures_until_s: float | None = None

    def start(self) -> None:
        """Let now be the zero of all times."""
        self._zero_s = time.monotonic()

    def wait(self, stage: int | None) -> None:
        """A wait for a stage begins, or, with None, is over."""
        now = time.monotonic()
        if stage is not None:
            self._waiting_since = now
        elif self._waiting_since is not None:
            self._waited_s += now - self._waiting_since
            self._waiting_since = None

    @contextmanager
    def task(self, group: int, step: int, *, has_pictures: bool = False) -> Iterator[None]:
        """Note what runs inside as a group's prompt (step 0) or token; waits inside count as before it."""
        begin_s, before_s = time.monotonic(), self._waited_s
        self._pictures_until_s = None
        yield
        end_s = time.monotonic()
        start_s = min(begin_s + self._waited_s - before_s, end_s)
        until_s = end_s if self.has_pictures_alone else self._pictures_until_s
        if step == 0 and has_pictures and until_s is not None:
            middle_s = max(start_s, until_s)
            self._note(group, step, "encode", start_s, middle_s)
            start_s = middle_s
        self._note(group, step, "decode" if step else "prefill", start_s, end_s)

    def pictures_are_done(self) -> None:
        """The first decoder layer begins: what ran until now in this task was about pictures, where it has any."""
        if self._pictures_until_s is None:
            self._pictures_until_s = time.monotonic()

    def _note(self, group: int, step: int, phase: Phase, start_s: float, end_s: float) -> None:
        self.tasks.append(
            Task(
                stage=self.stage,
                group=group,
                step=step,
                phase=phase,
                start_s=start_s - self._zero_s,
                end_s=end_s - self._zero_s,
            )
        )
