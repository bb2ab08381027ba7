"""Moves tensors to where a module runs; keyword arguments, which layers share, once per device however many read them.

One hook per entry of the device map and per atom inside it, because models call the parts of a module without calling
the module: `vision.encode(...)`. Tensors move only where a stage begins: elsewhere a hook looks at its arguments'
devices and leaves them alone. Caches are left alone: every layer's part already lies on that layer's device.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from planner.paths import owner
from runtime.atoms import find_atoms
from runtime.links import Links
from runtime.relocate import relocate, skip_keys

Copies = dict[int, tuple["weakref.ref[torch.Tensor]", int, torch.Tensor]]


class Courier:
    """Brings tensors to one device.

    Copies of shared tensors are remembered for as long as the original lives unchanged. The stream of hidden states,
    which layers take by position, is not: a remembered copy would outlive its only reader.
    """

    def __init__(self, device: torch.device, links: Links | None = None) -> None:
        self.device = device
        self._links = links or Links()
        self._copies: Copies = {}

    def bring(self, value: Any, *, shared: bool) -> Any:
        """`value` with every tensor in it on the device; what is already there is passed on as it is."""
        return relocate(value, self._remembered if shared else self._moved)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._links.send(tensor, self.device)

    def _remembered(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device or tensor.is_inference():
            # An inference tensor has no version to tell whether it has been written to since it was copied.
            return self._moved(tensor)
        known = self._copies.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        copy = self._moved(tensor)
        key, copies = id(tensor), self._copies
        self._copies[key] = (weakref.ref(tensor, lambda _: copies.pop(key, None)), tensor._version, copy)
        return copy


def attach_boundaries(
    model: nn.Module, device_map: Mapping[str, torch.device], home: torch.device, links: Links | None = None
) -> list[RemovableHandle]:
    """Hook `model` so that it runs split as `device_map` says, with inputs and results on `home`.

    Keys are FQNs; those of bare tensors need no hook. Arguments that the model's
    `_skip_keys_device_placement` names, its caches, stay where they are.
    """
    links = links or Links()
    skipped = skip_keys(model)
    modules = dict(model.named_modules())
    couriers = {device: Courier(device, links) for device in dict.fromkeys(device_map.values())}
    names = dict.fromkeys((*device_map, *(atom.name for atom in find_atoms(model))))
    handles = [
        modules[name].register_forward_pre_hook(_arrival_hook(couriers[device], skipped), with_kwargs=True)
        for name in names
        if name in modules and (device := device_map.get(owner(name, device_map) or "")) is not None
    ]
    handles.append(model.register_forward_hook(_return_hook(home, links)))
    return handles


def refuse_moves(model: nn.Module) -> None:
    """Let `model.to`, `.cuda` and `.cpu` raise RuntimeError: they would undo the placement that the hooks rely on."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "this model is placed on several devices by a plan, and moving it would break that. Load it again with "
            "another plan; .half() or .bfloat16() change its dtype, place_inputs(model, inputs) brings inputs to it."
        )

    for name in ("to", "cuda", "cpu"):
        setattr(model, name, refuse)


def _arrival_hook(courier: Courier, skipped: frozenset[str]) -> Any:
    device = courier.device

    def bring_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (_is_astray(args, device) or _any_astray(kwargs)):
            return None
        brought = {
            name: value if name in skipped else courier.bring(value, shared=True) for name, value in kwargs.items()
        }
        return courier.bring(args, shared=False), brought

    def _any_astray(kwargs: dict[str, Any]) -> bool:
        for name, value in kwargs.items():
            if value is not None and name not in skipped and _is_astray(value, device):
                return True
        return False

    return bring_inputs


def _is_astray(value: Any, device: torch.device) -> bool:
    """Whether a tensor in what `relocate` looks into lies elsewhere. Every layer of every step asks: no generators."""
    if isinstance(value, torch.Tensor):
        return value.device != device
    if isinstance(value, tuple | list):
        for item in value:
            if _is_astray(item, device):
                return True
    elif isinstance(value, dict):
        return _is_astray(tuple(value.values()), device)
    return False


def _return_hook(home: torch.device, links: Links) -> Any:
    """Moves the tensors at the top level of the model's output home; caches and what is nested stay."""

    def bring_results(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return links.send(output, home)
        if isinstance(output, dict):
            for key, value in output.items():
                if isinstance(value, torch.Tensor) and value.device != home:
                    output[key] = links.send(value, home)
        return output

    return bring_results
