"""ViT-bigG and a resampler: pixels -> a fixed number of features in the language model's width.

It does not know the language model.

Shapes: M images, S image size in pixels, G patches, C width of the blocks, H heads, E head width, Q queries, D width of
the language model.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from vlm.attention import attend
from vlm.qwen.configuration import QWenVisualConfig

EPS = 1e-6
"""Of every norm here. Source: Qwen-VL's visual.py, by way of vllm:vllm/model_executor/models/qwen_vl.py."""


def places_for(places_QC: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Learned places, a square of them, interpolated to the square of `num_patches`, in float32 meanwhile."""
    side, wanted = math.isqrt(len(places_QC)), math.isqrt(num_patches)
    if side == wanted:
        return places_QC
    square = places_QC.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=(wanted, wanted), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(places_QC.dtype)


class VisualAttention(nn.Module):
    """Attention of every patch to every other; a head's query, key and value lie side by side in the projection."""

    def __init__(self, config: QWenVisualConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.is_causal = False
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, hidden_MGC: torch.Tensor) -> torch.Tensor:
        packed = self.in_proj(hidden_MGC).unflatten(-1, (-1, 3, self.head_dim))
        return self.out_proj(attend(self, *packed.permute(3, 0, 2, 1, 4)))


class VisualMLP(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, config: QWenVisualConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.inner_width)
        self.c_proj = nn.Linear(config.inner_width, config.width)

    def forward(self, hidden_MGC: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(hidden_MGC)))


class VisualAttentionBlock(nn.Module):
    """Attention and feed-forward, each on normalised input and added to its own."""

    def __init__(self, config: QWenVisualConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = VisualAttention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = VisualMLP(config)

    def forward(self, hidden_MGC: torch.Tensor) -> torch.Tensor:
        hidden_MGC = hidden_MGC + self.attn(self.ln_1(hidden_MGC))
        return hidden_MGC + self.mlp(self.ln_2(hidden_MGC))


class VisualTransformer(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: QWenVisualConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisualAttentionBlock(config) for _ in range(config.layers))

    def forward(self, hidden_MGC: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            hidden_MGC = block(hidden_MGC)
        return hidden_MGC


class Resampler(nn.Module):
    """Learned queries that look at all patches once: (M, G, C) -> (M, Q, D)."""

    def __init__(self, config: QWenVisualConfig) -> None:
        super().__init__()
        width = config.output_dim
        # Sines and cosines, which official checkpoints contain.
        self.pos_embed = nn.Parameter(torch.zeros(config.n_queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(config.n_queries, width))
        self.kv_proj = nn.Identity() if config.width == width else nn.Linear(config.width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.resampler_heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=EPS)
        self.ln_kv = nn.LayerNorm(width, eps=EPS)

    def forward(self, hidden_MGC: torch.Tensor) -> torch.Tensor:
        value_MGD = self.ln_kv(self.kv_proj(hidden_MGC))
        key_MGD = value_MGD + places_for(self.pos_embed, hidden_MGC.shape[1])
        query_MQD = (self.ln_q(self.query) + self.pos_embed).expand(len(hidden_MGC), -1, -1)
        return self.attn(query_MQD, key_MGD, value_MGD, need_weights=False)[0]


class QWenVision(nn.Module):
    """Pixels of any float dtype (M, 3, S, S) -> features (M, Q, D)."""

    def __init__(self, config: QWenVisualConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(config.n_queries, config.width))
        self.ln_pre = nn.LayerNorm(config.width, eps=EPS)
        self.transformer = VisualTransformer(config)
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=EPS)
        self.proj = nn.Parameter(torch.zeros(config.output_dim, config.output_dim))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches_MGC = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        patches_MGC = patches_MGC + places_for(self.positional_embedding, patches_MGC.shape[1])
        return self.ln_post(self.attn_pool(self.transformer(self.ln_pre(patches_MGC)))) @ self.proj
