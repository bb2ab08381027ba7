"""Why a model's own code stopped during a run on virtual GPUs, in one message: where, and for which inputs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planner.errors import UnsupportedModelError

REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What model code raises for inputs that it does not take; NotImplementedError is a RuntimeError."""

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


@contextmanager
def explained(model: nn.Module, inputs: Mapping[str, Any], phase: Any) -> Iterator[None]:
    """Let errors of the model's code come out as UnsupportedModelError; `phase` has the phase that ran.

    Raises: UnsupportedModelError with module, line and inputs. Our own errors and full devices pass.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as problem:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if hasattr(value, "shape"))
        raise UnsupportedModelError(
            f"{type(model).__name__} stopped in its {phase.phase} with {type(problem).__name__}: {problem} "
            f"({_place(problem)}). Its inputs were {shapes}: pass the forward arguments that it takes, or a workload "
            "within its limits."
        ) from problem


def _place(problem: BaseException) -> str:
    """The innermost line of model code, outside torch and this package."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((_TORCH, _OURS))] or list(frames)
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: {own[-1].line}"
