"""Q-Former: learned queries that look at an image, in transformers' BLIP-2 parts under the official names.

Shapes: M images, Q queries, W their width, L positions of the vision encoder, C its width.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerIntermediate,
    Blip2QFormerMultiHeadAttention,
    Blip2QFormerOutput,
    Blip2QFormerSelfOutput,
)


class QFormerAttention(nn.Module):
    """Attention of queries to each other, or to an image; its modules are called `self` and `output`."""

    def __init__(self, config: Blip2QFormerConfig, *, to_image: bool) -> None:
        super().__init__()
        self.self = Blip2QFormerMultiHeadAttention(config, is_cross_attention=to_image)
        self.output = Blip2QFormerSelfOutput(config)

    def forward(self, query_MQW: torch.Tensor, image_MLC: torch.Tensor | None = None) -> torch.Tensor:
        mixed_MQW, _ = self.self(query_MQW, encoder_hidden_states=image_MLC)
        return self.output(mixed_MQW, query_MQW)


class QFormerLayer(nn.Module):
    """Attention among the queries, in some layers to the image, and a feed-forward, each normalised after adding."""

    def __init__(self, config: Blip2QFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = QFormerAttention(config, to_image=False)
        self.looks = layer_idx % config.cross_attention_frequency == 0
        if self.looks:
            self.crossattention = QFormerAttention(config, to_image=True)
        self.intermediate_query = Blip2QFormerIntermediate(config)
        self.output_query = Blip2QFormerOutput(config)

    def forward(self, query_MQW: torch.Tensor, image_MLC: torch.Tensor) -> torch.Tensor:
        query_MQW = self.attention(query_MQW)
        if self.looks:
            query_MQW = self.crossattention(query_MQW, image_MLC)
        return self.output_query(self.intermediate_query(query_MQW), query_MQW)


class QFormerEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(QFormerLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))

    def forward(self, query_MQW: torch.Tensor, image_MLC: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            query_MQW = layer(query_MQW, image_MLC)
        return query_MQW


class QFormerEmbeddings(nn.Module):
    """The norm that queries pass first; the official module has lost its word and position tables."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, query_MQW: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(query_MQW)


class QFormerBert(nn.Module):
    """Norm and layers."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.embeddings = QFormerEmbeddings(config)
        self.encoder = QFormerEncoder(config)

    def forward(self, query_MQW: torch.Tensor, image_MLC: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embeddings(query_MQW), image_MLC)


class QFormer(nn.Module):
    """Queries (M, Q, W) and what they look at (M, L, C) -> what they saw (M, Q, W)."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.bert = QFormerBert(config)

    def forward(self, query_MQW: torch.Tensor, image_MLC: torch.Tensor) -> torch.Tensor:
        return self.bert(query_MQW, image_MLC)
