"""Modules that a device map leaves on the host while others are on GPUs: they rest there, and run on a GPU.

Each is copied to its GPU when the one before it begins, and let go when it ends, so that two of them are there at most.
On CUDA the copies run on a stream of their own, from pinned memory, beside the computation; elsewhere they are made
when they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from planner.errors import PlanMismatchError
from planner.paths import owner
from planner.units import format_bytes
from runtime.atoms import find_atoms

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPrice:
    """What offloading costs: `bytes_per_forward` cross to the GPUs in every forward, so for every token."""

    modules: tuple[str, ...]
    bytes_per_forward: int

    def seconds_per_forward(self, bytes_per_s: float) -> float:
        """The least that a forward takes when the host's link carries `bytes_per_s`."""
        return self.bytes_per_forward / bytes_per_s

    def __str__(self) -> str:
        return (
            f"{len(self.modules)} modules rest on the host: {format_bytes(self.bytes_per_forward)} cross to the GPUs "
            f"for every token, {self.seconds_per_forward(25e9):.2f} s of it at 25 GB/s"
        )


def running_map(device_map: Mapping[str, torch.device]) -> dict[str, torch.device]:
    """Where each module runs: one that rests on the host runs with the nearest before it that does not, else after.

    A map that has nothing but the host is left as it is: it means the CPU.
    """
    gpus = [device for device in device_map.values() if device != HOST]
    if not gpus:
        return dict(device_map)
    running, last = {}, gpus[0]
    for name, device in device_map.items():
        last = last if device == HOST else device
        running[name] = last
    return running


def attach_offload(
    model: nn.Module, resting: Mapping[str, torch.device], running: Mapping[str, torch.device]
) -> OffloadPrice | None:
    """Hook what rests on the host and runs elsewhere; None when nothing does.

    Raises: PlanMismatchError for a bare tensor: only modules announce that they run.
    """
    found: dict[torch.device, dict[str, nn.Module]] = {}
    for atom in find_atoms(model):
        entry = owner(atom.name, resting) or ""
        if resting[entry] == running[entry]:
            continue
        if not atom.is_module:
            raise PlanMismatchError(
                f"{atom.name} is a bare tensor, read without a module of its own: it cannot rest on the host. Put it "
                "on the GPU of what reads it."
            )
        found.setdefault(running[entry], {})[atom.name] = model.get_submodule(atom.name)
    offloaded = [Offloaded(list(modules.values()), device) for device, modules in found.items()]
    for one in offloaded:
        one.attach(model)
    names = tuple(name for modules in found.values() for name in modules)
    return OffloadPrice(modules=names, bytes_per_forward=sum(o.num_bytes for o in offloaded)) if names else None


@dataclass(frozen=True, slots=True)
class Resting:
    """A tensor that rests on the host: the table of its module that holds it, its name there, and itself."""

    table: dict[str, Any]
    leaf: str
    host: torch.Tensor

    def on_device(self, copy: torch.Tensor) -> None:
        """Let the module see a copy."""
        is_parameter = isinstance(self.host, nn.Parameter)
        self.table[self.leaf] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy

    def back(self) -> None:
        """Let the module see the host's tensor again."""
        self.table[self.leaf] = self.host


class Offloaded:
    """Modules that rest on the host and take turns on one device, in the order given."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = modules
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._resting = [_resting(module, pin=self._stream is not None) for module in modules]
        self._ahead: dict[int, list[torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes that cross in a forward in which each module runs once."""
        return sum(one.host.nbytes for resting in self._resting for one in resting)

    def attach(self, model: nn.Module) -> None:
        """Hook the modules, and the model: its forward starts the first copy."""
        model.register_forward_pre_hook(lambda *_: self._fetch_ahead(0))
        for index, module in enumerate(self._modules):
            module.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            module.register_forward_hook(lambda *_, index=index: self._leave(index), always_call=True)

    def _fetch_ahead(self, index: int) -> None:
        """Start the copy of a module that is needed soon; without streams there is nothing to gain by it."""
        if self._stream is not None and index < len(self._modules) and index not in self._ahead:
            with torch.cuda.stream(self._stream):
                self._ahead[index] = self._copies(index)

    def _copies(self, index: int) -> list[torch.Tensor]:
        return [one.host.detach().to(self._device, non_blocking=True) for one in self._resting[index]]

    def _enter(self, index: int) -> None:
        self._fetch_ahead(index)
        copies = self._ahead.pop(index, None)
        if copies is None:
            copies = self._copies(index)
        elif self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for copy in copies:
                # Made on the other stream: its memory may be reused only when this one is done with it.
                copy.record_stream(current)
        for one, copy in zip(self._resting[index], copies, strict=True):
            one.on_device(copy)
        self._fetch_ahead(index + 1)

    def _leave(self, index: int) -> None:
        for one in self._resting[index]:
            one.back()


def _resting(module: nn.Module, *, pin: bool) -> list[Resting]:
    """Every tensor of a module, pinned for copies that run beside the computation."""
    tables = [table for inner in module.modules() for table in (inner._parameters, inner._buffers)]
    found = [Resting(table, leaf, tensor) for table in tables for leaf, tensor in table.items() if tensor is not None]
    for one in found if pin else ():
        one.host.data = one.host.data.pin_memory()
    return found
