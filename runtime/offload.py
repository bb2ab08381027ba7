"""Modules that rest on the host while others are on GPUs: they take turns in two slots on the GPU where they run.

While one runs, the next is copied into the other slot, and behind the last comes the first: the copies of one forward
go on into the next. On CUDA they run on a stream of their own, from pinned memory; elsewhere they are made at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from planner.errors import PlanMismatchError
from planner.paths import owner
from planner.streaming import NUM_SLOTS
from planner.units import format_bytes
from runtime.atoms import find_atoms

HOST = torch.device("cpu")
ALIGNMENT_BYTES = 256
"""Where tensors begin in a slot. Source: CUDA C++ programming guide: memory from cudaMalloc is aligned so."""


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

    Raises: PlanMismatchError for a bare tensor: only modules announce that they run; torch.OutOfMemoryError when a
    GPU has no room for its slots.
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


@dataclass(slots=True, kw_only=True)
class Piece:
    """A module's tensors in one piece of the host's memory: where each is in it, and the tables that name them."""

    memory: torch.Tensor
    parts: list[tuple[dict[str, Any], str, torch.Tensor, int]]

    def show(self, slot: torch.Tensor) -> None:
        """Let the module see the slot that this piece was copied to."""
        for table, leaf, tensor, start in self.parts:
            copy = slot[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            is_parameter = isinstance(tensor, nn.Parameter)
            table[leaf] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy

    def hide(self) -> None:
        """Let the module see the host's tensors again."""
        for table, leaf, tensor, _ in self.parts:
            table[leaf] = tensor


@dataclass(slots=True, kw_only=True)
class Slot:
    """Memory on a GPU for one module at a time, which one is there, and CUDA events: when it came, when it was left."""

    memory: torch.Tensor
    holds: int | None = None
    came: Any = field(default=None)
    left: Any = field(default=None)


class Offloaded:
    """Modules that rest on the host and take turns on one device, in the order given."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pieces = [_piece(module, pin=self._stream is not None) for module in modules]
        size = max(piece.memory.nbytes for piece in self._pieces)
        self._slots = [
            Slot(memory=torch.empty(size, dtype=torch.uint8, device=device))
            for _ in range(min(NUM_SLOTS, len(self._pieces)))
        ]
        if self._stream is not None:  # what had the slots' memory before may still be read
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._modules = modules
        self._running: Slot | None = None
        self._turn = threading.Lock()
        self._thread = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that cross in a forward in which each module runs once; as many as there are slots stay in them."""
        if len(self._pieces) <= NUM_SLOTS:
            return 0
        return sum(tensor.nbytes for piece in self._pieces for _, _, tensor, _ in piece.parts)

    def attach(self, model: nn.Module) -> None:
        """Hook the modules, and the model: its forward starts the first copy."""
        model.register_forward_pre_hook(lambda *_: self._begin())
        for index, module in enumerate(self._modules):
            module.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
            module.register_forward_hook(lambda *_, index=index: self._leave(index), always_call=True)

    def _begin(self) -> None:
        with self._turn:
            self._refuse_other_thread()
            self._running = None  # still set where an interrupt ended a forward
            self._fetch(0)

    def _refuse_other_thread(self) -> None:
        """Two forwards at once would copy into each other's slots."""
        this = threading.get_ident()
        if self._running is not None and self._thread != this:
            raise RuntimeError(
                "another thread is running this model, whose layers on the host take turns in two slots of the GPU: "
                "run one forward at a time, or load the model once per thread"
            )
        self._thread = this

    def _enter(self, index: int) -> None:
        with self._turn:
            self._refuse_other_thread()
            slot = self._running = self._fetch(index)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(slot.came)
        self._pieces[index].show(slot.memory)
        self._fetch((index + 1) % len(self._pieces))

    def _leave(self, index: int) -> None:
        if threading.get_ident() != self._thread:
            return  # a forward that was refused
        self._pieces[index].hide()
        if self._stream is not None and self._running is not None:
            current = torch.cuda.current_stream(self._device)
            self._running.left = current.record_event()
        self._running = None

    def _fetch(self, index: int) -> Slot:
        """The slot that holds a module, or will when its copy is done: the one that is not running, where none does."""
        for slot in self._slots:
            if slot.holds == index:
                return slot
        slot = next((slot for slot in self._slots if slot is not self._running), self._slots[0])
        piece, slot.holds = self._pieces[index].memory, index
        target = slot.memory[: piece.nbytes]
        if self._stream is None:
            target.copy_(piece)
            return slot
        if slot.left is not None:
            self._stream.wait_event(slot.left)
        with torch.cuda.stream(self._stream):
            target.copy_(piece, non_blocking=True)
            slot.came = self._stream.record_event()
        return slot


def _piece(module: nn.Module, *, pin: bool) -> Piece:
    """A module's tensors moved into one piece of memory, pinned for copies that run beside the computation.

    One that its module names twice is there once for each name.
    """
    tables = [table for inner in module.modules() for table in (inner._parameters, inner._buffers)]
    named = [(table, leaf, tensor) for table in tables for leaf, tensor in table.items() if tensor is not None]
    starts, end = [], 0
    for _, _, tensor in named:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    memory = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
    parts = []
    for (table, leaf, tensor), start in zip(named, starts, strict=True):
        home = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = home.copy_(tensor.detach())
        parts.append((table, leaf, tensor, start))
    return Piece(memory=memory, parts=parts)
