"""What the system tells of processes: signals to this one as bytes in a socket, and the end of others by handles."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from threading import current_thread, main_thread

from runtime.pipeline.members import Member


class SignalSocket:
    """SIGTERM and SIGINT as bytes: a handler in Python would wait for the main thread, which waits for a message."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self.received: int | None = None
        self._is_set = current_thread() is main_thread()
        if self._is_set:
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
                # What the system does by itself reaches no socket.
                signal.signal(signal.SIGINT, signal.default_int_handler)
            self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._handler = signal.signal(signal.SIGTERM, lambda number, frame: None)

    def read(self) -> None:
        """Note the last signal that came."""
        try:
            for number in self.reader.recv(64):
                if number in (signal.SIGTERM, signal.SIGINT):
                    self.received = number
        except BlockingIOError:
            return

    def close(self) -> None:
        """Let signals go where they went before."""
        if self._is_set:
            signal.set_wakeup_fd(self._before)
            signal.signal(signal.SIGTERM, self._handler)
        self.reader.close()
        self._writer.close()

    def poke(self) -> None:
        """Wake whoever waits for a signal."""
        self._writer.send(b"\0")


def handles_of(me: Member, members: Sequence[Member]) -> dict[int, int]:
    """By rank, handles of the other processes of this host: they stay theirs even when a number is used again."""
    handles: dict[int, int] = {}
    for member in members if hasattr(os, "pidfd_open") else ():
        if member.agent == me.agent and member.rank != me.rank:
            # One that has ended by now is found out by its silence.
            with suppress(ProcessLookupError):
                handles[member.rank] = os.pidfd_open(member.pid)
    return handles


def has_ended(handle: int) -> bool:
    """Whether the process of a handle has."""
    return bool(select.select([handle], [], [], 0)[0])
