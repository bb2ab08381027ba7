"""A watch over a model's first forward: what modules are given, and what meets between them, before it runs.

Features of pictures and text are merged by code between modules (a masked scatter, an assignment, a concatenation), so
no module's hook would see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from planner.errors import PlanMismatchError
from runtime.atoms import find_atoms
from runtime.mismatch import Place, calling_place
from runtime.placed import Placed
from runtime.relocate import tensors_in

MERGES = frozenset(
    {torch.Tensor.masked_scatter, torch.Tensor.masked_scatter_, torch.Tensor.scatter, torch.Tensor.scatter_}
    | {torch.Tensor.__setitem__, torch.Tensor.index_put_, torch.Tensor.index_copy_, torch.where, torch.cat, torch.stack}
)
FEATURES_DIM = 2
"""Features have a position and a width; what has less is ids, masks or counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One operation between modules, its line, and the shape and device of every operand with dimensions."""

    op: str
    place: Place
    operands: tuple[tuple[tuple[int, ...], torch.device], ...]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where operands lie, each once."""
        return tuple(dict.fromkeys(device for _, device in self.operands))

    def __str__(self) -> str:
        met = ", ".join(f"{list(shape)} on {device}" for shape, device in self.operands)
        return f"{self.op} at {self.place}: {met}"


class MergeWatch(TorchFunctionMode):
    """Notes merges while no part that a plan places is running; refuses one whose operands lie apart.

    Index tensors may be on the host, as on any GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Merge] = []
        self.depth = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.depth == 0 and func in MERGES:
            self._look_at(func.__name__, [*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))

    def _look_at(self, op: str, operands: list[Any]) -> None:
        tensors = [tensor for _, tensor in tensors_in(operands) if tensor.dim()]
        features = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() >= FEATURES_DIM]
        if not features:
            return
        seen = tuple((tuple(tensor.shape), tensor.device) for tensor in tensors)
        merge = Merge(op=op, place=calling_place(), operands=seen)
        if len({tensor.device for tensor in features}) > 1:
            raise PlanMismatchError(
                f"operands are about to meet that lie apart: {merge}. Put what makes them together."
            )
        self.found.append(merge)


class FirstForward:
    """The watch over one forward, with the hooks that it needs; it ends with that forward, however that ends."""

    def __init__(self, model: Placed) -> None:
        self._model = model
        self._merges = MergeWatch()
        self._over = False
        modules = dict(model.named_modules())
        self._handles = [model.register_forward_pre_hook(self._begin)]
        for atom in find_atoms(model):
            if atom.is_module and atom.name and next(modules[atom.name].parameters(), None) is not None:
                enter = self._enter(atom.name)
                self._handles.append(modules[atom.name].register_forward_pre_hook(enter, with_kwargs=True))
                self._handles.append(modules[atom.name].register_forward_hook(self._leave, always_call=True))
        self._handles.append(model.register_forward_hook(self._end, always_call=True))

    def _begin(self, *_: Any) -> None:
        # Hooks are removed here and not in `_end`: torch runs hooks of a failed forward off the very table.
        if self._over:
            for handle in self._handles:
                handle.remove()
        else:
            self._merges.__enter__()

    def _end(self, *_: Any) -> None:
        if not self._over:
            self._over = True
            self._merges.__exit__(None, None, None)
            self._model.merges = tuple(self._merges.found)

    def _enter(self, name: str) -> Any:
        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._over:
                self._merges.depth += 1
                _refuse_strangers(name, module, (*args, *kwargs.values()))

        return check

    def _leave(self, *_: Any) -> None:
        self._merges.depth -= 1


def watch_first_forward(model: Placed) -> None:
    """Watch the next forward of a placed model; afterwards `model.merges` is what met between modules.

    Watched is what boundaries bring tensors to: a container with a parameter of its own may lie on several devices.
    Raises (from the forward): PlanMismatchError with the module that is given a tensor from another device, or the
    operation whose operands lie apart.
    """
    FirstForward(model)


def _refuse_strangers(name: str, module: nn.Module, values: tuple[Any, ...]) -> None:
    device = next(module.parameters()).device
    for value in values:
        if isinstance(value, torch.Tensor) and value.dim() and value.device != device:
            raise PlanMismatchError(
                f"{name} ({type(module).__name__}) lies on {device} and was given a tensor of shape "
                f"{tuple(value.shape)} on {value.device}. Its inputs must be moved there: put it beside what "
                "feeds it, or attach the plan's boundaries to it."
            )
