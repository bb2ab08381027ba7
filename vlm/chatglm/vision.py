"""EVA2-CLIP: pixels -> features in the language model's width, a beginning and an end for each image.

Its blocks normalise what they add, not what they read. It does not know the language model.

Shapes: M images, S image size in pixels, L positions of the encoder (patches and a class), C its width, H heads,
E head width, P positions of an image, D width of the language model.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from vlm.attention import attend
from vlm.chatglm.configuration import ChatGLMConfig, ChatGLMVisionConfig


class EvaPatchEmbedding(nn.Module):
    """Pixels (M, 3, S, S) -> patches after a class position, each with its place added (M, L, C)."""

    def __init__(self, config: ChatGLMVisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches_MLC = self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        classes_M1C = self.cls_embedding.expand(len(patches_MLC), -1, -1)
        return torch.cat((classes_M1C, patches_MLC), dim=1) + self.position_embedding.weight


class EvaAttention(nn.Module):
    """Attention of every position to every other."""

    def __init__(self, config: ChatGLMVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.is_causal = False
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_MLC: torch.Tensor) -> torch.Tensor:
        packed_ML3HE = self.query_key_value(hidden_MLC).unflatten(-1, (3, -1, self.head_dim))
        return self.dense(attend(self, *packed_ML3HE.permute(2, 0, 3, 1, 4)))


class EvaMLP(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, config: ChatGLMVisionConfig) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_MLC: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_MLC)))


class EvaLayer(nn.Module):
    """Attention and feed-forward, the output of each normalised and added to its input."""

    def __init__(self, config: ChatGLMVisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EvaAttention(config)
        self.mlp = EvaMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_MLC: torch.Tensor) -> torch.Tensor:
        hidden_MLC = hidden_MLC + self.input_layernorm(self.attention(hidden_MLC))
        return hidden_MLC + self.post_attention_layernorm(self.mlp(hidden_MLC))


class EvaTransformer(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: ChatGLMVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EvaLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_MLC: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_MLC = layer(hidden_MLC)
        return hidden_MLC


class GatedProjector(nn.Module):
    """A linear layer, then a gated feed-forward of the language model's size."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.linear_proj = nn.Linear(width, width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.dense_h_to_4h = nn.Linear(width, inner_width, bias=False)
        self.gate_proj = nn.Linear(width, inner_width, bias=False)
        self.dense_4h_to_h = nn.Linear(inner_width, width, bias=False)

    def forward(self, hidden_MPD: torch.Tensor) -> torch.Tensor:
        hidden_MPD = F.gelu(self.norm1(self.linear_proj(hidden_MPD)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(hidden_MPD)) * self.dense_h_to_4h(hidden_MPD))


class EvaVisionModel(nn.Module):
    """Pixels of any float dtype (M, 3, S, S) -> features (M, P, D): beginning, squares of four patches, end."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.patch_embedding = EvaPatchEmbedding(vision)
        self.transformer = EvaTransformer(vision)
        self.linear_proj = GatedProjector(config.hidden_size, config.intermediate_size)
        self.conv = nn.Conv2d(vision.hidden_size, config.hidden_size, kernel_size=2, stride=2)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.scaling_factor = vision.scaling_factor

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches_MLC = self.transformer(self.patch_embedding(pixel_values))[:, 1:]
        side = math.isqrt(patches_MLC.shape[1])
        picture = patches_MLC.transpose(1, 2).unflatten(2, (side, side))
        features_MPD = self.linear_proj(self.conv(picture).flatten(2).transpose(1, 2))
        ends = (end.expand(len(features_MPD), -1, -1) for end in (self.boi, self.eoi))
        # As in the official code, nothing is moved: beginning and end meet what the projector returns.
        return torch.cat((next(ends), features_MPD, next(ends)), dim=1) / self.scaling_factor
