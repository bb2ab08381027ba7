"""Which torch device stands for each of a plan's devices: real GPUs, virtual ones, the CPU, or the caller's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import MachineError, PlanMismatchError
from planner.paths import owner
from planner.plan import HOST, DeviceKey, Plan, device_key
from runtime.virtual import virtual_gpus

UNLIMITED_BYTES = 2**60
"""Capacity of virtual GPUs that only observe."""

Devices = str | Sequence[str | torch.device] | None


def torch_devices(plan: Plan, devices: Devices) -> dict[DeviceKey, torch.device]:
    """The torch device of every device of the plan, and of the host where something rests there.

    `None` means the real GPUs, "virtual" virtual ones of the planned sizes, "cpu" the CPU for all of them, a list one
    device each in the plan's order.
    Raises: MachineError when a GPU is not there, or the list's length is not the plan's.
    """
    if len(plan.machine.hosts) > 1:
        raise MachineError(
            f"the plan spans hosts {', '.join(plan.machine.hosts)}: it runs with one process per stage, which "
            "plan-devices launch PLAN MODEL ... starts, or runtime.pipeline.Pipeline under torchrun"
        )
    keys = [device_key(plan.machine, position) for position in range(len(plan.machine.devices))]
    # Context and reserve hold no tensors; a device that they use up may still be one that the plan leaves empty.
    left = [max(1, d.memory_bytes - d.context_bytes - d.reserve_bytes) for d in plan.machine.devices]
    chosen = choose_devices([device.index for device in plan.machine.devices], devices, left, "the plan")
    if len(chosen) != len(keys):
        raise MachineError(f"devices lists {len(chosen)} devices, the plan has {len(keys)}: give one for each")
    host = {HOST: torch.device("cpu")} if plan.offload else {}
    return dict(zip(keys, chosen, strict=True)) | host


def choose_devices(
    indices: Sequence[int], devices: Devices, capacities_bytes: Sequence[int], who: str
) -> Sequence[torch.device]:
    """What `devices` means for GPUs of these indices; virtual ones get these capacities. `who` needs them.

    Raises: MachineError when a GPU is not there, virtual ones are in use, or a name is no device's.
    """
    if devices is None:
        return _real_gpus(indices, who)
    if devices == "cpu":
        return [torch.device("cpu")] * len(indices)
    if devices == "virtual":
        return _virtual_gpus(capacities_bytes)
    if isinstance(devices, str):
        raise MachineError(f"devices={devices!r} is unknown: give None (real GPUs), 'virtual', 'cpu' or a list")
    try:
        return [torch.device(device) for device in devices]
    except RuntimeError as problem:
        raise MachineError(f"devices {list(devices)} are not all torch devices: {problem}") from problem


def refuse_uncovered(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Raise PlanMismatchError when a device map leaves a parameter or buffer without a device."""
    named = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    uncovered = [name for name in named if owner(name, device_map) is None]
    if uncovered:
        raise PlanMismatchError(
            f"the device map gives no device to {len(uncovered)} tensors: {', '.join(uncovered[:3])}. "
            "Every parameter and buffer needs an entry for itself or a module around it."
        )


def _real_gpus(indices: Sequence[int], who: str) -> list[torch.device]:
    found = torch.cuda.device_count()
    missing = [f"cuda:{index}" for index in indices if index >= found]
    if missing:
        raise MachineError(
            f"{who} needs {', '.join(missing)}, and torch sees {found} CUDA GPUs here. "
            "Pass devices='virtual' to try it without them, or devices='cpu' to run on the CPU."
        )
    return [torch.device("cuda", index) for index in indices]


def _virtual_gpus(capacities_bytes: Sequence[int]) -> Sequence[torch.device]:
    try:
        return virtual_gpus(capacities_bytes).devices
    except RuntimeError as problem:
        raise MachineError(
            f"virtual GPUs are in use: {problem}, for instance an earlier model (del model)"
        ) from problem
