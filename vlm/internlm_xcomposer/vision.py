"""EVA-CLIP's ViT-g: pixels -> features of every patch and of a class. It has no final norm; its user has.

Shapes: M images, S image size in pixels, L positions (a class and the patches), C width, H heads, E head width.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2MLP

from vlm.attention import attend


class EvaPatchEmbedding(nn.Module):
    """Pixels (M, 3, S, S) -> patches (M, L - 1, C)."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class EvaAttention(nn.Module):
    """Attention of every position to every other; queries and values have biases, keys none."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_MLC: torch.Tensor) -> torch.Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        packed = (self.qkv(hidden_MLC) + bias).unflatten(-1, (3, -1, self.head_dim))
        return self.proj(attend(self, *packed.permute(2, 0, 3, 1, 4)))


class EvaBlock(nn.Module):
    """Attention and feed-forward, each on normalised input and added to its own."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = EvaAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Blip2MLP(config)

    def forward(self, hidden_MLC: torch.Tensor) -> torch.Tensor:
        hidden_MLC = hidden_MLC + self.attn(self.norm1(hidden_MLC))
        return hidden_MLC + self.mlp(self.norm2(hidden_MLC))


class EvaVisionEncoder(nn.Module):
    """Pixels of any float dtype (M, 3, S, S) -> features (M, L, C)."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        num_patches = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, config.hidden_size))
        self.patch_embed = EvaPatchEmbedding(config)
        self.blocks = nn.ModuleList(EvaBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches_MLC = self.patch_embed(pixel_values)
        hidden_MLC = torch.cat((self.cls_token.expand(len(patches_MLC), -1, -1), patches_MLC), dim=1) + self.pos_embed
        for block in self.blocks:
            hidden_MLC = block(hidden_MLC)
        return hidden_MLC
