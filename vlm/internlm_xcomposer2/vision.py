"""Pictures as tensors -> features. It does not know the language model.

Shapes: B batch, T tokens, D width, M images in the batch, S image size in pixels, N image positions in the batch.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class VisionTower(nn.Module):
    """CLIP's last hidden state, before its final norm."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        clip = CLIPVisionModel(config)
        # transformers releases differ in whether CLIPVisionModel contains a `vision_model` or is it
        self.vision_model = getattr(clip, "vision_model", clip)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vision_model(pixel_values).last_hidden_state


class VisionEncoder(nn.Module):
    """Pixels of any float dtype (M, 3, S, S) -> the features of every patch, without the class token's."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.vision_tower = VisionTower(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.vision_tower(pixel_values)[:, 1:]


def image_rows(im_mask_BT: torch.Tensor, inputs_embeds_BTD: torch.Tensor | None) -> torch.Tensor | None:
    """Flattened positions where a mask is true; none when it is true nowhere.

    Raises: ValueError when there are no embeddings for the mask, or of another shape.
    """
    if inputs_embeds_BTD is None or inputs_embeds_BTD.shape[:2] != im_mask_BT.shape:
        found = None if inputs_embeds_BTD is None else tuple(inputs_embeds_BTD.shape[:2])
        raise ValueError(
            f"im_mask {tuple(im_mask_BT.shape)} marks the image positions of inputs_embeds, whose batch and length "
            f"are {found}"
        )
    image_index_N = im_mask_BT.flatten().nonzero().squeeze(1)
    return image_index_N if len(image_index_N) else None
