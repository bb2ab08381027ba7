"""Pictures as tensors -> features, and their place in a sequence of text embeddings.

It does not know the language model. Text embeddings and image features are joined on the devices they come on: what
fails with the official code has to fail here.

Shapes: B batch, T tokens, D width, M images in the batch, P positions per image, S image size in pixels, N image
positions in the batch (M * P).
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


def join_text_and_images(
    embed: nn.Module, input_ids_BT: torch.Tensor, features_MPD: torch.Tensor, starts: list[int]
) -> torch.Tensor:
    """Embeddings (B, T, D) of a batch whose images begin at the flattened positions `starts`.

    As in the official code, a plain concatenation: nothing is moved to where the rest is.
    """
    flat_ids = input_ids_BT.flatten()
    pieces = []
    text_start = 0
    for image_start, features_PD in zip(starts, features_MPD, strict=True):
        if image_start > text_start:
            pieces.append(embed(flat_ids[text_start:image_start]))
        pieces.append(features_PD)
        text_start = image_start + len(features_PD)
    if text_start < len(flat_ids):
        pieces.append(embed(flat_ids[text_start:]))
    return torch.cat(pieces).unflatten(0, input_ids_BT.shape)


def image_starts(positions: list[int], *, num_images: int, image_tokens: int, num_tokens: int) -> list[int]:
    """Where each image begins, given every image position of a batch with `num_tokens` per sample, flattened.

    Raises: ValueError when the positions are not one unbroken run, within one sample, for each image.
    """
    if len(positions) != num_images * image_tokens:
        raise ValueError(
            f"the prompt has {len(positions)} image positions, "
            f"but {num_images} images of {image_tokens} positions each were given"
        )
    starts, ends = positions[::image_tokens], positions[image_tokens - 1 :: image_tokens]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end - start != image_tokens - 1 or start // num_tokens != end // num_tokens:
            raise ValueError(
                f"image {number} (counted from 0) begins at position {start % num_tokens} of sample "
                f"{start // num_tokens}, but its {image_tokens} positions are not consecutive in that sample"
            )
    return starts


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
