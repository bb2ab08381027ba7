"""What really lies where: each planned module's devices and bytes, and each GPU's memory beside the plan's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from planner.errors import PlanMismatchError
from planner.paths import contains
from planner.units import format_bytes
from runtime.placed import Placed
from runtime.quantised import held_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlacement:
    """One entry of the device map: where it should be, the devices its tensors are on, and their bytes."""

    module: str
    planned: torch.device
    found: tuple[torch.device, ...]
    num_bytes: int

    @property
    def ok(self) -> bool:
        """Whether every tensor is where it should be."""
        return set(self.found) <= {self.planned}

    def __str__(self) -> str:
        found = ", ".join(map(str, self.found)) or "nothing"
        return f"{self.module}: planned {self.planned}, found {found} ({format_bytes(self.num_bytes)})"


def inspect_placement(model: nn.Module) -> tuple[ModulePlacement, ...]:
    """Every entry of a loaded model's device map, modules and bare tensors, beside where its tensors are.

    Raises: PlanMismatchError for a model that was not placed by a map.
    """
    device_map: Mapping[str, torch.device] | None = getattr(model, "hf_device_map", None)
    if device_map is None:
        raise PlanMismatchError("this model has no device map: load it with load_sharded, or shard it first")
    return tuple(_placement(model, name, device) for name, device in device_map.items())


def verify_placement(model: nn.Module) -> None:
    """Raise PlanMismatchError, naming every module, when any is not where the plan says."""
    wrong = [placement for placement in inspect_placement(model) if not placement.ok]
    if wrong:
        raise PlanMismatchError("modules are not where the plan says:\n" + "\n".join(map(str, wrong)))


def placement_lines(model: Placed) -> list[str]:
    """Every entry of the device map beside what was found."""
    return [f"{found} - {'as planned' if found.ok else 'NOT AS PLANNED'}" for found in inspect_placement(model)]


def merge_lines(model: Placed) -> list[str]:
    """What met between modules in the first forward, where that was watched."""
    return [f"merge: {merge}" for merge in getattr(model, "merges", ())]


def link_lines(model: Placed) -> list[str]:
    """How tensors cross between GPUs, for every link that was used."""
    return [f"{source} -> {target}: copied {route}" for (source, target), route in model.links.routes.items()]


def memory_lines(model: Placed) -> list[str]:
    """One line per GPU: the most that was allocated and reserved on it, beside what the plan foresaw for tensors."""
    plan, device_map = model.plan, inspect_placement(model)
    lines = []
    for device in dict.fromkeys(placement.planned for placement in device_map if placement.planned.type != "cpu"):
        keys = {key for name, key in plan.placement.items() if model.hf_device_map[name] == device}
        parts = [plan.memory[key] for key in keys]
        planned = sum(part.total_bytes - part.context_bytes - part.reserve_bytes for part in parts)
        module = torch.get_device_module(device)
        reserved = module.max_memory_reserved(device) if hasattr(module, "max_memory_reserved") else None
        lines.append(
            f"{device}: at most {format_bytes(module.max_memory_allocated(device))} allocated"
            + (f", {format_bytes(reserved)} reserved" if reserved is not None else "")
            + f"; planned {format_bytes(planned)}"
        )
    return lines


def _placement(model: nn.Module, name: str, device: torch.device) -> ModulePlacement:
    named = (*model.named_parameters(), *model.named_buffers())
    tensors = [tensor for path, tensor in named if contains(name, path)]
    return ModulePlacement(
        module=name,
        planned=device,
        found=tuple(dict.fromkeys(tensor.device for tensor in tensors)),
        num_bytes=sum(part.nbytes for tensor in tensors for part in held_tensors(tensor)),
    )
