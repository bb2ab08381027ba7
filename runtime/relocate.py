"""Tensors inside nested arguments, moved one by one; everything else, caches included, is passed on untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Move = Callable[[torch.Tensor], torch.Tensor]


def relocate(value: Any, move: Move) -> Any:
    """`value` with `move` applied to every tensor in its tuples, lists and dicts (transformers' outputs included)."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple):
        items = [relocate(item, move) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is list:
        return [relocate(item, move) for item in value]
    if isinstance(value, dict):
        items = {key: relocate(item, move) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    return value
