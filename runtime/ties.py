"""Tied weights: parameters that several modules share, kept once on each of their devices where a plan says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from planner.paths import owner

Users = list[tuple[nn.Module, str, str]]
"""Modules that share a parameter: the module, the parameter's name in it, and its FQN."""


@contextmanager
def ties_apart(model: nn.Module, *, wanted: bool = True) -> Iterator[None]:
    """While it lasts, every user of a tied parameter has one of its own, of the same memory; without `wanted`, nothing.

    A copy of the model that is made meanwhile has them apart for good.
    """
    ties = _ties(model) if wanted else []
    changed = [(module, leaf, shared) for shared, users in ties for module, leaf, _ in users[1:]]
    for module, leaf, shared in changed:
        module._parameters[leaf] = nn.Parameter(shared.detach(), requires_grad=False)
    try:
        yield
    finally:
        for module, leaf, shared in changed:
            module._parameters[leaf] = shared


def keep_copies(model: nn.Module, device_map: Mapping[str, torch.device]) -> None:
    """Give every device that `device_map` has a user of a tied parameter on its own copy, which its users share.

    Raises: torch.OutOfMemoryError when a device is full.
    """
    for shared, users in _ties(model):
        copies = {shared.device: shared}
        for module, leaf, name in users:
            device = device_map[owner(name, device_map) or ""]
            if device not in copies:
                copies[device] = nn.Parameter(shared.detach().to(device), requires_grad=shared.requires_grad)
            module._parameters[leaf] = copies[device]


def _ties(model: nn.Module) -> list[tuple[nn.Parameter, Users]]:
    """Parameters with more than one user; a module that has several names is one."""
    users: dict[int, Users] = {}
    shared: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                shared[id(parameter)] = parameter
                users.setdefault(id(parameter), []).append((module, leaf, f"{path}.{leaf}" if path else leaf))
    return [(shared[key], found) for key, found in users.items() if len(found) > 1]
