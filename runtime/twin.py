"""A copy of a model whose weights lie on given devices; the original is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

DeviceOf = Callable[[str], torch.device]


def make_twin(model: nn.Module, device_of: DeviceOf) -> nn.Module:
    """A deep copy of `model` with every parameter and buffer on `device_of(name)`, each copied once.

    A tied parameter stays one, on the device of its first name: as such it reaches accelerate's dispatch, which ties
    again what its hooks took apart. Where its users are on several devices, one of them meets it elsewhere.
    """
    copies: dict[int, Any] = {}
    for name, tensor in _named_tensors(model):
        if id(tensor) not in copies:
            copies[id(tensor)] = _placed(tensor, device_of(name))
    return copy.deepcopy(model, copies).eval()


def let_go(twin: nn.Module) -> None:
    """Undo what makes a hooked twin refer to itself, so that it dies with its last name and not in a collection.

    A collection looks at every object of the process: on small models it takes longer than the run.
    """
    remove_hook_from_submodules(twin)
    for module in twin.modules():
        # accelerate puts back the class's own method, but bound and on the instance.
        module.__dict__.pop("forward", None)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device, copy=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
