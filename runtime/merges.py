"""Where features of pictures meet those of text: the devices of all operands, looked at before the operation runs.

Code between modules does it (a masked scatter, an assignment, a concatenation), so no module's hook would see it.
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


def watch_merges(model: nn.Module) -> None:
    """Watch the next forward of `model`; what was found is on `model.merges` when it ends.

    Raises (from the forward): PlanMismatchError when operands lie apart.
    """
    watch = MergeWatch()
    modules = dict(model.named_modules())
    handles: list[Any] = []

    def step(by: int) -> Any:
        def count(*_: Any) -> None:
            watch.depth += by

        return count

    def begin(*_: Any) -> None:
        watch.__enter__()

    def end(*_: Any) -> None:
        watch.__exit__(None, None, None)
        model.merges = tuple(watch.found)
        for handle in handles:
            handle.remove()

    for atom in find_atoms(model):
        if atom.is_module and atom.name:
            handles.append(modules[atom.name].register_forward_pre_hook(step(1)))
            handles.append(modules[atom.name].register_forward_hook(step(-1), always_call=True))
    handles.append(model.register_forward_pre_hook(begin))
    handles.append(model.register_forward_hook(end, always_call=True))
