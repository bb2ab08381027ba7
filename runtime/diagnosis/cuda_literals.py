"""Code that says `.cuda()` or `device="cuda"`, run on virtual GPUs all the same: it gets the current GPU, and is noted.

On a real machine such code means the process's current GPU, which is 0 unless it was set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from runtime.mismatch import Place, calling_place
from runtime.proof import sign

MADE_BY_LITERAL = "a hard-coded device"
"""What a tensor is signed with that such code made or moved."""


class CudaLiterals(TorchFunctionMode):
    """While entered, a CUDA device in a call of torch stands for virtual GPU 0; `places` are the lines that had one."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[Place, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return self._noted(args[0].to(_current(args[1] if len(args) > 1 else kwargs.get("device"))))
        if not _named(args, kwargs):
            return func(*args, **kwargs)
        args = tuple(_translated(value) for value in args)
        return self._noted(func(*args, **{name: _translated(value) for name, value in kwargs.items()}))

    def _noted(self, outcome: Any) -> Any:
        self.places.setdefault(calling_place())
        if isinstance(outcome, torch.Tensor) and outcome.device.type == "vgpu":
            sign(outcome, MADE_BY_LITERAL)
        return outcome


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(_is_cuda(value) for value in args[1:3]) or _is_cuda(kwargs.get("device"))


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def _translated(value: Any) -> Any:
    return _current(value) if _is_cuda(value) else value


def _current(device: Any) -> torch.device:
    """The virtual GPU that a CUDA device, an index or nothing means."""
    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("vgpu", device)
    index = torch.device(device).index if device is not None else None
    return torch.device("vgpu", index or 0)
