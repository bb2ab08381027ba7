"""The watch over a job's processes: one that dies, hangs or gives up ends the job everywhere, with one message.

Every process has a thread that beats into the job's store and looks at the others' beats, at a handle of each process
of its own host, and at signals. The first to see a fault writes it into the store, prints it and ends what hangs beside
it; the others see it there and leave.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread

import torch
import torch.distributed as dist

from planner.errors import ConstraintError, PlannerError
from runtime.pipeline.agreement import DisagreementError
from runtime.pipeline.members import Member
from runtime.pipeline.signals import SignalSocket, handles_of, has_ended

BEAT_S = 1.0
SILENCE_S = 10.0
"""Without a beat for so long a process counts as hanging: on a busy machine a thread may not run for seconds."""
LOCKED_FACTOR = 6
"""A large message over a slow link lets everybody wait for a while: only after so many times the silence is it odd."""
WAITING = "waiting"
FAREWELL_S = 2.0
"""How long a process that has seen a fault stays, so that others find it in the store, which may go with the first."""
INTERRUPTION, INTERRUPTED = "interrupted", 130
EXIT_CODE = "exit_code"
"""The job's exit code in the file that torchrun keeps of a process's failure."""
_FAULT, _BEAT, _DONE = "fault", "beat", "done"
_UNREAD = "the answers were not read to the end: read them all, or ask fewer questions"


class PipelineError(PlannerError):
    """The job has ended: a process died, hung or ran out of memory. The message says which, and has been printed."""

    is_reported = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Who ended the job, and why."""

    member: str
    cause: str
    exit_code: int = 1

    def __str__(self) -> str:
        return f"{self.member}: {self.cause}"


class Watch:
    """One process's part of the watch; `start` begins it, `leave` ends it without a fault.

    `error_file` is where torchrun looks for what a process has to say of its failure.
    """

    def __init__(
        self,
        store: dist.Store,
        me: Member,
        members: Sequence[Member],
        *,
        silence_s: float = SILENCE_S,
        error_file: Path | None = None,
    ) -> None:
        # Its own connection: the main one may be in a wait.
        self._store = dist.PrefixStore("watch", store.clone())
        self._store.set_timeout(timedelta(seconds=silence_s))
        self._me = me
        self._members = {member.rank: member for member in members}
        self._silence_s = silence_s
        self._error_file = error_file
        self._heard = {rank: ("", time.monotonic()) for rank in self._members}
        self._all_wait_since: float | None = None
        self._handles = handles_of(me, members)
        self._doing = "starting"
        self._left = Event()
        self._over: Fault | None = None
        self._parent = os.getppid()
        self._signals = SignalSocket()
        self._thread = Thread(target=self._run, name="pipeline watch", daemon=True)
        self._waits_for: int | None = None
        self._abandoned_since: float | None = None

    def start(self) -> None:
        """Begin to beat and to look."""
        self._thread.start()

    def leave(self) -> None:
        """Say goodbye: this process ends well."""
        self._left.set()
        self._signals.poke()
        self._thread.join(timeout=2 * BEAT_S)
        if not self._thread.is_alive():
            self._signals.close()
            for handle in self._handles.values():
                os.close(handle)

    def doing(self, what: str) -> None:
        """Note what this process works on, for the message if it fails."""
        self._doing = what

    def waits_for(self, rank: int | None) -> None:
        """Note the rank whose message is waited for, None when that is over."""
        self._waits_for = rank

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Make an exception inside the job's fault.

        Raises: PipelineError for a full device, or a message that did not come; others as they are.
        """
        try:
            yield
        except torch.OutOfMemoryError as problem:
            raise PipelineError(
                str(self._fail(f"out of memory while {self._doing}: {_first_line(problem)}"))
            ) from problem
        except DisagreementError as problem:
            # All processes have found the same, and none is to be ended: the first one says it.
            if self._me.stage == 0:
                self._say(str(problem), problem.exit_code)
            problem.is_reported = True
            self.leave()
            raise
        except PlannerError as problem:
            self._fail(str(problem), exit_code=problem.exit_code)
            problem.is_reported = True
            raise
        except KeyboardInterrupt as problem:
            error = PipelineError(str(self._fail(INTERRUPTION, exit_code=INTERRUPTED)))
            error.exit_code = INTERRUPTED
            raise error from problem
        except (RuntimeError, OSError) as problem:
            if self._waits_for is None:
                self._fail(f"{type(problem).__name__} while {self._doing}: {_first_line(problem)}")
                raise
            # What a message ended with says nothing: why it did not come does.
            raise PipelineError(str(self._explained(problem))) from None
        except GeneratorExit:
            # An exception on its way to whoever guards it closes the generators that it passes, too.
            self._abandoned_since = time.monotonic()
            raise
        except BaseException as problem:
            self._fail(f"{type(problem).__name__} while {self._doing}: {_first_line(problem)}")
            raise

    def _fail(self, cause: str, *, exit_code: int = 1) -> Fault:
        return self._report(self._fault(cause, exit_code=exit_code))

    def _fault(self, cause: str, *, member: Member | None = None, exit_code: int = 1) -> Fault:
        """A fault of this process, or of another one that it has found."""
        return Fault(member=str(member or self._me), cause=cause, exit_code=exit_code)

    def refuse_abandoned(self) -> None:
        """Raise ConstraintError when answers were left unread: other stages wait for what will not come."""
        if self._abandoned_since is not None:
            raise ConstraintError(_UNREAD)

    def _explained(self, problem: BaseException) -> Fault:
        """Why a message did not come: what the watch finds out, or else that the connection broke."""
        end_s = time.monotonic() + self._silence_s + 2 * BEAT_S
        while self._over is None and time.monotonic() < end_s:
            time.sleep(BEAT_S / 10)
        if self._over is not None:
            return self._over
        assert self._waits_for is not None
        cause = f"the connection to it broke while {self._doing}: {_first_line(problem)}"
        return self._report(self._fault(cause, member=self._members[self._waits_for]))

    def _report(self, fault: Fault) -> Fault:
        """Let `fault` be the job's, unless another was first; the one that is. It is printed once."""
        mine = json.dumps(asdict(fault))
        try:
            # An empty expectation: only a key that is not there yet is set.
            found = self._store.compare_set(_FAULT, "", mine).decode()
        except (RuntimeError, dist.DistError):
            found = mine
        first = Fault(**json.loads(found))
        if found == mine:
            self._say(f"{str(first).rstrip('.')}. The job has ended on every rank", first.exit_code)
        self._over = first
        return first

    def _say(self, text: str, exit_code: int) -> None:
        """Print why the job ends, and let the launcher know that it has been said."""
        sys.stderr.write(f"plan-devices: {text.rstrip('.')}.\n")
        sys.stderr.flush()
        if self._error_file is not None:
            self._error_file.write_text(json.dumps({"message": text, EXIT_CODE: exit_code}))

    # -- the thread

    def _run(self) -> None:
        beats = 0
        while not self._left.is_set():
            beats += 1
            fault = self._look(beats)
            if fault is not None:
                self._end(fault)
                return
            self._sleep()
        try:
            self._store.set(f"{_DONE}/{self._me.rank}", "1")
        except (RuntimeError, dist.DistError):
            return

    def _look(self, beats: int) -> Fault | None:
        """The fault that ends the job, if there is one."""
        if self._over is not None:
            return self._over
        if os.getppid() != self._parent:
            return self._cut_off("the process that started it is gone")
        if self._abandoned_since is not None and time.monotonic() - self._abandoned_since > self._silence_s:
            return self._fail(_UNREAD, exit_code=ConstraintError.exit_code)
        try:
            self._store.set(f"{_BEAT}/{self._me.rank}", f"{beats} {WAITING if self._waits_for is not None else ''}")
            if self._store.check([_FAULT]):
                return Fault(**json.loads(self._store.get(_FAULT)))
            return self._dead() or self._silent() or self._locked() or self._asked_to_end()
        except (RuntimeError, dist.DistError):
            return self._cut_off("the launcher's store is gone: another host has ended the job, and says why")

    def _cut_off(self, cause: str) -> Fault:
        """That no process of this host can reach others any more: the first one says so."""
        fault = self._fault(cause)
        siblings = [rank for rank, member in self._members.items() if member.agent == self._me.agent]
        return self._report(fault) if self._me.rank == min(siblings) else fault

    def _dead(self) -> Fault | None:
        """Who of this host has ended without a goodbye."""
        for rank, handle in list(self._handles.items()):
            if has_ended(handle):
                del self._handles[rank]
                if not self._store.check([f"{_DONE}/{rank}"]):
                    cause = "its process died (killed, or crashed)"
                    return self._report(self._fault(cause, member=self._members[rank]))
        return None

    def _silent(self) -> Fault | None:
        now = time.monotonic()
        for rank in self._members:
            if rank == self._me.rank:
                continue
            key = f"{_BEAT}/{rank}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            known, since = self._heard[rank]
            if beat != known:
                self._heard[rank] = (beat, now)
            elif now - since > self._silence_s and not self._store.check([f"{_DONE}/{rank}"]):
                cause = f"it hangs: no sign of life for {now - since:.0f} s"
                return self._report(self._fault(cause, member=self._members[rank]))
        return None

    def _locked(self) -> Fault | None:
        """That every process waits for a message, and has done so for long: none will come."""
        now = time.monotonic()
        beats = [beat for rank, (beat, _) in self._heard.items() if rank != self._me.rank]
        if self._waits_for is None or not all(beat.endswith(WAITING) for beat in beats):
            self._all_wait_since = None
        elif self._all_wait_since is None:
            self._all_wait_since = now
        elif now - self._all_wait_since > LOCKED_FACTOR * self._silence_s:
            cause = f"all processes wait for each other, this one while {self._doing}: a mistake of plan-devices"
            return self._fail(cause)
        return None

    def _asked_to_end(self) -> Fault | None:
        """torchrun ends all processes when one has failed, whose own message may be on its way."""
        number = self._signals.received
        if number is None:
            return None
        end_s = time.monotonic() + BEAT_S
        while time.monotonic() < end_s:
            if self._store.check([_FAULT]):
                return Fault(**json.loads(self._store.get(_FAULT)))
            time.sleep(BEAT_S / 20)
        if number == signal.SIGINT:
            return self._fail(INTERRUPTION, exit_code=INTERRUPTED)
        elsewhere = any(member.agent != self._me.agent for member in self._members.values())
        hint = ", perhaps because another host has ended: see there" if elsewhere else ""
        return self._fail(f"asked to end by {signal.Signals(number).name}{hint}", exit_code=128 + number)

    def _end(self, fault: Fault) -> None:
        """Leave with the whole process: its main thread may wait for what will never come."""
        self._over = fault
        deadline_s = time.monotonic() + FAREWELL_S
        self._kill_hanging(fault)
        while time.monotonic() < deadline_s and not self._left.is_set():
            time.sleep(BEAT_S / 20)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(fault.exit_code)

    def _kill_hanging(self, fault: Fault) -> None:
        """End the process at fault where it is on this host: a stopped one heeds no other signal."""
        for rank, handle in self._handles.items():
            if str(self._members[rank]) == fault.member and not has_ended(handle):
                signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _sleep(self) -> None:
        """Until the next beat, or until something happens."""
        select.select([self._signals.reader, *self._handles.values()], [], [], BEAT_S)
        self._signals.read()


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:300]
