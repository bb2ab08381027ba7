"""How torchrun started this process, and the way to the other processes of the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from planner.errors import ConstraintError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_TIMEOUT = timedelta(minutes=2)
"""To find each other: processes of one job start within seconds, but import torch on busy machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """This process among those of the job: its rank, its place on its host, and where they meet.

    `agent` tells torchrun's own processes apart: ranks of one agent run on one host. `error_file` is where torchrun
    looks for why this process failed.
    """

    rank: int
    world_size: int
    local_rank: int
    agent: int
    address: str
    error_file: Path | None = None

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Launched:
        """What torchrun says.

        Raises: ConstraintError where it does not: this process was started in another way.
        """
        try:
            return cls(
                rank=int(variables["RANK"]),
                world_size=int(variables["WORLD_SIZE"]),
                local_rank=int(variables["LOCAL_RANK"]),
                agent=int(variables.get("GROUP_RANK", 0)),
                address=variables["MASTER_ADDR"],
                error_file=Path(variables["TORCHELASTIC_ERROR_FILE"])
                if "TORCHELASTIC_ERROR_FILE" in variables
                else None,
            )
        except (KeyError, ValueError) as problem:
            raise ConstraintError(
                f"a pipeline has one process per stage, and nothing says which this is ({problem}): start it with "
                "plan-devices launch PLAN ..., or with torchrun"
            ) from problem


def join(launched: Launched, device: torch.device, timeout: timedelta) -> tuple[dist.Store, dist.ProcessGroup]:
    """The job's store, and the process group over the host; the default group sends between GPUs where there are any.

    `timeout` is the longest wait for a message. A process may join again after it has left.
    """
    if launched.address in LOOPBACK and sys.platform == "linux":
        # gloo would take the interface of the host's name, which others can reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    # What an earlier job of these processes has left there is not this one's.
    number = found.add(f"plan-devices/joined/{rank}", 1)
    store = dist.PrefixStore(f"plan-devices/{number}", found)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    words = dist.new_group(backend="gloo", timeout=timeout)
    assert words is not None, "a group of all ranks holds this one"
    return store, words
