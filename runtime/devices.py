"""Which torch device stands for each of a plan's devices: real GPUs, virtual ones, the CPU, or the caller's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from planner.errors import MachineError, PlanMismatchError
from planner.paths import owner
from planner.plan import DeviceKey, Plan, device_key
from runtime.virtual import virtual_gpus

Devices = str | Sequence[str | torch.device] | None


def torch_devices(plan: Plan, devices: Devices) -> dict[DeviceKey, torch.device]:
    """The torch device of every device of the plan.

    `None` means the real GPUs, "virtual" virtual ones of the planned sizes, "cpu" the CPU for all of them, a list one
    device each in the plan's order.
    Raises: MachineError when a GPU is not there, or the list's length is not the plan's.
    """
    if len(plan.machine.hosts) > 1:
        raise MachineError(f"the plan spans hosts {', '.join(plan.machine.hosts)}: one process loads one host's part")
    keys = [device_key(plan.machine, position) for position in range(len(plan.machine.devices))]
    if devices is None:
        return dict(zip(keys, _real_gpus(plan), strict=True))
    if devices == "cpu":
        return dict.fromkeys(keys, torch.device("cpu"))
    if devices == "virtual":
        return dict(zip(keys, _virtual_gpus(plan), strict=True))
    if isinstance(devices, str):
        raise MachineError(f"devices={devices!r} is unknown: give None (real GPUs), 'virtual', 'cpu' or a list")
    if len(devices) != len(keys):
        raise MachineError(f"devices lists {len(devices)} devices, the plan has {len(keys)}: give one for each")
    try:
        return dict(zip(keys, map(torch.device, devices), strict=True))
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


def _real_gpus(plan: Plan) -> list[torch.device]:
    found = torch.cuda.device_count()
    missing = [device.name for device in plan.machine.devices if device.index >= found]
    if missing:
        raise MachineError(
            f"the plan needs {', '.join(missing)}, and torch sees {found} CUDA GPUs here. "
            "Pass devices='virtual' to try the plan without them, or devices='cpu' to run on the CPU."
        )
    return [torch.device("cuda", device.index) for device in plan.machine.devices]


def _virtual_gpus(plan: Plan) -> Sequence[torch.device]:
    """Virtual GPUs with what remains of each planned device after context and reserve, which hold no tensors."""
    left = (device.memory_bytes - device.context_bytes - device.reserve_bytes for device in plan.machine.devices)
    try:
        return virtual_gpus([max(1, num_bytes) for num_bytes in left]).devices
    except RuntimeError as problem:
        raise MachineError(
            f"virtual GPUs are in use: {problem}, for instance an earlier model (del model)"
        ) from problem
