"""`shard`: a model that is in memory already, placed and hooked as a plan or a device map says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from planner.errors import MachineError, PlanMismatchError
from planner.paths import owner
from planner.plan import DeviceKey, Plan
from runtime.boundary import attach_boundaries, refuse_moves
from runtime.devices import UNLIMITED_BYTES, Devices, choose_devices, refuse_uncovered, torch_devices
from runtime.offload import attach_offload, running_map

Module = TypeVar("Module", bound=nn.Module)


def shard(
    model: Module, plan_or_device_map: Plan | Mapping[str, DeviceKey | str | torch.device], *, devices: Devices = None
) -> Module:
    """`model` itself, tensors moved to their devices and boundaries hooked; inputs go to the map's first device.

    `devices` is as for `load_sharded`; a device map of integers takes it too, with virtual GPUs of any size. What a map
    with GPUs puts on "cpu" rests there and is copied to a GPU to run, which `model.offload` prices.
    Raises: PlanMismatchError when a tensor has no device; MachineError when the devices are not there.
    """
    _refuse_to_quantise(model, plan_or_device_map)
    device_map = _torch_map(plan_or_device_map, devices)
    refuse_uncovered(model, device_map)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        _move(model, name, tensor, device_map[owner(name, device_map) or ""])
    running = _running(plan_or_device_map, device_map)
    model.offload = attach_offload(model, device_map, running)
    attach_boundaries(model, running, _home(plan_or_device_map, running))
    refuse_moves(model)
    model.hf_device_map = dict(device_map)
    return model


def _refuse_to_quantise(model: nn.Module, given: object) -> None:
    """Raise PlanMismatchError for a plan of quantised weights and a model of plain ones, which stay so here."""
    if isinstance(given, Plan) and given.quantization is not None and not getattr(model, "is_quantized", False):
        raise PlanMismatchError(
            f"the plan is for weights in {', '.join(given.quantization.layouts)}, and this model's are plain: "
            "load_sharded quantises them while it loads them"
        )


def _move(model: nn.Module, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """A parameter keeps its identity, and with it its ties, unless it is tied to one on another device."""
    if tensor.device == device:
        return
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    current = module._parameters.get(leaf)
    if current is None:
        module._buffers[leaf] = tensor.to(device)
    elif current.device.type in ("cpu", "meta"):
        current.data = current.data.to(device)
    else:
        module._parameters[leaf] = nn.Parameter(current.detach().to(device), requires_grad=current.requires_grad)


def _torch_map(given: Plan | Mapping[str, DeviceKey | str | torch.device], devices: Devices) -> dict[str, torch.device]:
    if isinstance(given, Plan):
        places = torch_devices(given, devices)
        return {name: places[key] for name, key in given.device_map.items()}
    indices = range(max((value for value in given.values() if isinstance(value, int)), default=-1) + 1)
    chosen = choose_devices(indices, devices, [UNLIMITED_BYTES] * len(indices), "the device map") if indices else ()
    if len(chosen) < len(indices):
        raise MachineError(f"devices lists {len(chosen)} devices, the device map's integers go up to {indices[-1]}")
    return {name: chosen[value] if isinstance(value, int) else torch.device(value) for name, value in given.items()}


def _running(given: object, device_map: Mapping[str, torch.device]) -> dict[str, torch.device]:
    """Where what rests on the host runs: with its stage, or in a map that has none, with what stands before it."""
    if not isinstance(given, Plan):
        return running_map(device_map)
    places = {key: device_map[name] for name, key in given.placement.items()}
    return {name: places[key] for name, key in given.running.items()}


def _home(given: object, device_map: Mapping[str, torch.device]) -> torch.device:
    if isinstance(given, Plan) and "input_ids" in given.input_devices:
        key = given.input_devices["input_ids"]
        return next(device_map[name] for name, value in given.device_map.items() if value == key)
    return min(device_map.values(), key=lambda device: device.index or 0)
