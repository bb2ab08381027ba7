"""Partial LoRA: a linear layer whose low-rank part acts on the image positions of the sequence only.

It is told which rows are image positions; it does not know where they come from.

Shapes: B batch, T tokens, N image positions in the batch, I and O input and output width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class LinearFactory(Protocol):
    """What builds the linear layers of a decoder layer: `nn.Linear`, or `PLoRALinear` with its rank filled in."""

    def __call__(self, in_features: int, out_features: int, *, bias: bool) -> nn.Linear: ...


class PLoRALinear(nn.Linear):
    """A linear layer, plus `Plora_B(Plora_A(x)) * alpha / rank` in the rows of image positions.

    The official layer also drops out its low-rank input while training; this one is for inference.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, rank: int, alpha: int) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.Plora_A = nn.Linear(in_features, rank, bias=False)
        self.Plora_B = nn.Linear(rank, out_features, bias=False)
        self.plora_scaling = alpha / rank

    def forward(self, input_BTI: torch.Tensor, image_index_N: torch.Tensor | None = None) -> torch.Tensor:
        """Plain output, and the low-rank part added in place in the rows `image_index_N` of B * T."""
        output_BTO = super().forward(input_BTI)
        if image_index_N is None:
            return output_BTO
        # Nested, so that the copied rows are gone before the wider low-rank output is made.
        delta_NO = self.Plora_B(self.Plora_A(input_BTI.flatten(0, -2).index_select(0, image_index_N)))
        # view, not flatten: a copy would silently lose the addition
        output_BTO.view(-1, self.out_features).index_add_(0, image_index_N, delta_NO, alpha=self.plora_scaling)
        return output_BTO


def project(linear: nn.Linear, input_BTI: torch.Tensor, image_index_N: torch.Tensor | None) -> torch.Tensor:
    """The output of a plain or a partial-LoRA layer; without image positions both are called alike."""
    return linear(input_BTI) if image_index_N is None else linear(input_BTI, image_index_N)
