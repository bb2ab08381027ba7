"""A copy of a model whose weights lie on given devices; the original is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

DeviceOf = Callable[[str], torch.device]


def make_twin(model: nn.Module, device_of: DeviceOf) -> nn.Module:
    """A deep copy of `model` with every parameter and buffer on `device_of(name)`, each copied once.

    A tied parameter whose names are on several devices is there on each of them, as accelerate does it.
    """
    copies: dict[int, Any] = {}
    for name, tensor in _named_tensors(model):
        if id(tensor) not in copies:
            copies[id(tensor)] = _placed(tensor, device_of(name))
    twin = copy.deepcopy(model, copies)
    for name, tensor in list(_named_tensors(twin)):
        device = device_of(name)
        if tensor.device != device:
            path, _, leaf = name.rpartition(".")
            module = twin.get_submodule(path)
            tensors = module._parameters if leaf in module._parameters else module._buffers
            tensors[leaf] = _placed(tensor, device)
    return twin.eval()


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device, copy=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
