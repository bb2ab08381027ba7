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

from planner.errors import ConstraintError, MachineError
from runtime.pipeline.network import interface_towards

STORE_TIMEOUT = timedelta(seconds=30)
"""To reach the launcher's store, which is there before it starts a process."""
MESSAGE_TIMEOUT = timedelta(hours=2)
"""Longer than any step takes: who hangs is found out by the watch, and much sooner."""


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


def store_of(launched: Launched) -> dist.Store:
    """The job's store, which torchrun keeps. A process may join again after it has left.

    Raises: MachineError when nobody answers there.
    """
    interface = interface_towards(launched.address) if sys.platform == "linux" else None
    if interface is not None:
        # gloo would take the interface of the host's name: others reach it though they need not, or cannot reach it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        found, rank, _ = next(dist.rendezvous("env://", timeout=STORE_TIMEOUT))
        # What an earlier job of these processes has left there is not this one's.
        number = found.add(f"plan-devices/joined/{rank}", 1)
    except (RuntimeError, dist.DistError) as problem:
        raise MachineError(f"the launcher's store at {launched.address} does not answer: {problem}") from problem
    return dist.PrefixStore(f"plan-devices/{number}", found)


def words_group(launched: Launched, store: dist.Store) -> dist.ProcessGroup:
    """The process group of all stages over the host, which is torch's default group."""
    dist.init_process_group(
        backend="gloo", store=store, rank=launched.rank, world_size=launched.world_size, timeout=MESSAGE_TIMEOUT
    )
    group = dist.group.WORLD
    assert group is not None, "it has just been made"
    return group


def values_group(device: torch.device, words: dist.ProcessGroup) -> dist.ProcessGroup:
    """The process group that tensors on `device` are sent in: between GPUs where there are any, else over the host."""
    if device.type != "cuda":
        return words
    group = dist.new_group(backend="nccl", timeout=MESSAGE_TIMEOUT)
    assert group is not None, "a group of all ranks holds this one"
    return group
