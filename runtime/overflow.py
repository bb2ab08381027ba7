"""float16 ends at 65504: a model made for bfloat16 may exceed it, and then every token after is nonsense."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def report_overflow(model: nn.Module) -> None:
    """Let a forward whose last logits are infinite or no numbers raise FloatingPointError, with what to do.

    It costs one reduction over a row of logits and the wait for it, which `generate` has in every step anyway.
    """

    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and not bool(torch.isfinite(logits[:, -1]).all()):
            raise FloatingPointError(
                f"the logits are infinite or no numbers: {logits.dtype} ends at {torch.finfo(logits.dtype).max:.0f}, "
                "and this model goes beyond. Load it in bfloat16 or float32 (plan with --dtype bfloat16)."
            )

    model.register_forward_hook(check)
