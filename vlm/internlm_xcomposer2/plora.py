"""Partial LoRA: a linear layer whose low-rank part acts on the image positions of the sequence only.

It is told which rows are image positions; it does not know where they come from. XComposer2.5 adds plain LoRAs that act
on every position, one or two for each task.

Shapes: B batch, T tokens, N image positions in the batch, I and O input and output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn


class LinearFactory(Protocol):
    """What builds the linear layers of a decoder layer: `nn.Linear`, or `PLoRALinear` with its rank filled in."""

    def __call__(self, in_features: int, out_features: int, *, bias: bool) -> nn.Linear: ...


@dataclass(frozen=True, slots=True)
class Linears:
    """What builds the packed projection of queries, keys and values, and what builds the four other linear layers."""

    packed: LinearFactory = nn.Linear
    other: LinearFactory = nn.Linear


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
        output_BTO = self._dense(input_BTI)
        if image_index_N is None:
            return output_BTO
        # Nested, so that the copied rows are gone before the wider low-rank output is made.
        delta_NO = self.Plora_B(self.Plora_A(input_BTI.flatten(0, -2).index_select(0, image_index_N)))
        # view, not flatten: a copy would silently lose the addition
        output_BTO.view(-1, self.out_features).index_add_(0, image_index_N, delta_NO, alpha=self.plora_scaling)
        return output_BTO

    def _dense(self, input_BTI: torch.Tensor) -> torch.Tensor:
        return super().forward(input_BTI)


INFER_MODES: Mapping[str, tuple[str, ...]] = MappingProxyType({"base": (), "write": ("sft", "dpo"), "web": ("web",)})
"""The LoRAs of each `infer_mode` of XComposer2.5, in the order in which they are added."""


class TaskLoRALinear(PLoRALinear):
    """A partial-LoRA layer with further LoRAs for every row, unscaled: `lora_<name>_A` and `_B`. One mode's are used.

    `task_ranks` are their ranks by name; a mode asks for those that the layer has.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, rank: int, alpha: int, task_ranks: Mapping[str, int]
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, rank=rank, alpha=alpha)
        for name, task_rank in task_ranks.items():
            self.add_module(f"lora_{name}_A", nn.Linear(in_features, task_rank, bias=False))
            self.add_module(f"lora_{name}_B", nn.Linear(task_rank, out_features, bias=False))
        self.active: tuple[str, ...] = ()

    def _dense(self, input_BTI: torch.Tensor) -> torch.Tensor:
        output_BTO = super()._dense(input_BTI)
        for name in self.active:
            down, up = self.get_submodule(f"lora_{name}_A"), self.get_submodule(f"lora_{name}_B")
            output_BTO = output_BTO + up(down(input_BTI))
        return output_BTO


def project(linear: nn.Linear, input_BTI: torch.Tensor, image_index_N: torch.Tensor | None) -> torch.Tensor:
    """The output of a plain or a partial-LoRA layer; without image positions both are called alike."""
    return linear(input_BTI) if image_index_N is None else linear(input_BTI, image_index_N)
