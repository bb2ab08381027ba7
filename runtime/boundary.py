"""Moves tensors to where a module runs; keyword arguments, which layers share, once per device however many read them.

Only modules that can receive something from elsewhere get a hook: those away from the inputs' device, and the first
of each stage. Caches are left alone: every layer's part already lies on that layer's device.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Copies = dict[int, tuple["weakref.ref[torch.Tensor]", int, torch.Tensor]]


class Courier:
    """Brings tensors to one device.

    Copies of shared tensors are remembered for as long as the original lives unchanged. The stream of hidden states,
    which layers take by position, is not: a remembered copy would outlive its only reader.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Copies = {}

    def bring(self, value: Any, *, shared: bool) -> Any:
        """`value` with every tensor in it on the device; what is already there is passed on as it is."""
        if isinstance(value, torch.Tensor):
            if value.device == self._device:
                return value
            return self._remembered(value) if shared else value.to(self._device, non_blocking=True)
        if type(value) in (tuple, list):
            return type(value)([self.bring(item, shared=shared) for item in value])
        if type(value) is dict:
            return {key: self.bring(item, shared=shared) for key, item in value.items()}
        return value

    def _remembered(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self._copies.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        copy = tensor.to(self._device, non_blocking=True)
        key, copies = id(tensor), self._copies
        self._copies[key] = (weakref.ref(tensor, lambda _: copies.pop(key, None)), tensor._version, copy)
        return copy


def attach_boundaries(
    model: nn.Module, device_map: Mapping[str, torch.device], home: torch.device
) -> list[RemovableHandle]:
    """Hook `model` so that it runs split as `device_map` says, with inputs and results on `home`.

    Keys are module FQNs in execution order.
    """
    couriers = {device: Courier(device) for device in dict.fromkeys(device_map.values())}
    handles = []
    previous: torch.device | None = None
    for name, device in device_map.items():
        if name and (device != home or device != previous):
            hook = _arrival_hook(couriers[device])
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        previous = device
    handles.append(model.register_forward_hook(_return_hook(home)))
    return handles


def _arrival_hook(courier: Courier) -> Any:
    def bring_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return courier.bring(args, shared=False), courier.bring(kwargs, shared=True)

    return bring_inputs


def _return_hook(home: torch.device) -> Any:
    """Moves the tensors at the top level of the model's output home; caches and what is nested stay."""

    def bring_results(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output.to(home)
        if isinstance(output, dict):
            for key, value in output.items():
                if isinstance(value, torch.Tensor) and value.device != home:
                    output[key] = value.to(home)
        return output

    return bring_results
