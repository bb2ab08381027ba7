"""Weights that rest on the host and take turns on a GPU: what that costs there, in bytes and nanoseconds.

A stage's groups on the host share two slots on its GPU, each as large as the largest of them. While one runs, the next
is copied into the other slot; behind the last comes the first of the next pass. This file knows no solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planner.machine import Device, Link
from planner.timing import COPY_LATENCY_S, PCIE_BYTES_PER_S, Times, transfer_ns

NUM_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """What the groups on the host cost a stage: bytes of slots, bytes that cross in every pass, and how long it waits.

    `waiting` counts from when a slot's copy starts to when its group could have run, beyond what other work covers.
    """

    slots_bytes: int = 0
    pass_bytes: int = 0
    waiting: Times = Times()


NOTHING = Streaming()


def host_bytes_per_s(device: Device) -> float:
    """What the device's link to the host carries; where the machine does not say, PCI Express 3.0 x16."""
    return device.host_bandwidth_bytes_per_s or PCIE_BYTES_PER_S


def copy_ns(device: Device, num_bytes: int) -> int:
    """One copy from the host: of all that a group weighs, which lies in one piece of pinned memory."""
    rate = host_bytes_per_s(device)
    link = Link(source="host", target=device.name, bandwidth_bytes_per_s=rate, latency_s=COPY_LATENCY_S)
    return transfer_ns(num_bytes, link)


def streaming(device: Device, spent: Sequence[Times], host_bytes: Sequence[int | None]) -> Streaming:
    """What a stage on `device` pays for its groups, in execution order: their times, and bytes where on the host.

    As many groups as there are slots stay in them for good. A prompt's first group finds its slot empty; from token to
    token the copies go on. Other stages' work would cover more of a copy: it is not counted, so the wait is no shorter.
    """
    streamed = [(index, size) for index, size in enumerate(host_bytes) if size is not None]
    if not streamed:
        return NOTHING
    slots_bytes = min(NUM_SLOTS, len(streamed)) * max(size for _, size in streamed)
    if len(streamed) <= NUM_SLOTS:
        return Streaming(slots_bytes=slots_bytes)
    starts = [index for index, _ in streamed]
    by_size = {size: copy_ns(device, size) for size in {size for _, size in streamed}}  # layers are mostly alike
    copies_ns = [by_size[size] for _, size in streamed]
    token_ns = [sum(times.token_ns for times in spent[a:b]) for a, b in pairwise([0, *starts, len(spent)])]
    first_ns = [sum(times.first_ns for times in spent[a:b]) for a, b in pairwise([0, *starts])]
    # Before the first group comes what follows the last one of the pass before.
    around_ns = [token_ns[-1] + token_ns[0], *token_ns[1:-1]]
    return Streaming(
        slots_bytes=slots_bytes,
        pass_bytes=sum(size for _, size in streamed),
        waiting=Times(
            first_ns=sum(max(0, copy - covered) for copy, covered in zip(copies_ns, first_ns, strict=True)),
            token_ns=sum(max(0, copy - covered) for copy, covered in zip(copies_ns, around_ns, strict=True)),
        ),
    )
