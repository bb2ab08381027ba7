"""Where images stand in a sequence of token ids: found, checked, filled with features, dealt out to beams.

It knows no model. Text embeddings and image features are joined on the devices they come on: what fails with the
official codes, which join alike, has to fail here.

Shapes: B batch, T tokens, D width, M images in the batch, P positions of an image (not the same for each).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput


def join_text_and_images(
    embed: nn.Module, input_ids_BT: torch.Tensor, features: Sequence[torch.Tensor], starts: Sequence[int]
) -> torch.Tensor:
    """Embeddings (B, T, D) of a batch whose images, each (P, D), begin at the flattened positions `starts`.

    As in the official codes, a plain concatenation: nothing is moved to where the rest is.
    """
    flat_ids = input_ids_BT.flatten()
    pieces = []
    text_start = 0
    for image_start, features_PD in zip(starts, features, strict=True):
        if image_start > text_start:
            pieces.append(embed(flat_ids[text_start:image_start]))
        pieces.append(features_PD)
        text_start = image_start + len(features_PD)
    if text_start < len(flat_ids):
        pieces.append(embed(flat_ids[text_start:]))
    return torch.cat(pieces).unflatten(0, input_ids_BT.shape)


def image_starts(positions: Sequence[int], lengths: Sequence[int], *, num_tokens: int) -> list[int]:
    """Where each image begins, given every image position of a batch with `num_tokens` per sample, flattened.

    Raises: ValueError when the positions are not one unbroken run of an image's length, within one sample, for each.
    """
    if len(positions) != sum(lengths):
        raise ValueError(
            f"the prompt has {len(positions)} image positions, "
            f"but {len(lengths)} images of {_counts(lengths)} were given"
        )
    starts = []
    taken = 0
    for number, length in enumerate(lengths):
        start, end = positions[taken], positions[taken + length - 1]
        if end - start != length - 1 or start // num_tokens != end // num_tokens:
            raise ValueError(
                f"image {number} (counted from 0) begins at position {start % num_tokens} of sample "
                f"{start // num_tokens}, but its {length} positions are not consecutive in that sample"
            )
        starts.append(start)
        taken += length
    return starts


def _counts(lengths: Sequence[int]) -> str:
    if len(set(lengths)) > 1:
        return f"{', '.join(map(str, lengths))} positions"
    return f"{lengths[0] if lengths else 0} positions each"


def images_per_sample(starts: Sequence[int], *, num_samples: int, num_tokens: int) -> list[int]:
    """How many images each sample has."""
    counts = Counter(start // num_tokens for start in starts)
    return [counts[sample] for sample in range(num_samples)]


def dealt_out(rows: torch.Tensor, per_sample: Sequence[int], times: int) -> torch.Tensor:
    """Rows that belong to samples, `per_sample` each, repeated as whole samples' worth: a, b, a, b for two beams."""
    parts = rows.split(list(per_sample))
    return torch.cat([part.repeat(times, *[1] * (rows.dim() - 1)) for part in parts])


def ids_for_images(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, im_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The ids that pixels come with.

    Raises: ValueError when there are none, or embeddings or a mask as well.
    """
    if input_ids is None or inputs_embeds is not None or im_mask is not None:
        raise ValueError("pixel_values go with input_ids alone: not with inputs_embeds, nor with im_mask")
    return input_ids


class TakesImages(GenerationMixin):
    """A language model whose images stand in `input_ids` as copies of `config.image_token_id`.

    An image is one row of `pixel_values` and takes `config.image_tokens` positions. Its features are what
    `get_image_features` of the model makes of it. In generation every beam gets its own sample's images.
    """

    config: Any
    get_image_features: Callable[..., BaseModelOutput]
    get_input_embeddings: Callable[[], nn.Module]

    def image_index(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Every image position of the flattened batch."""
        return (input_ids_BT == self.config.image_token_id).flatten().nonzero().squeeze(1)

    def find_image_starts(self, input_ids_BT: torch.Tensor, pixel_values: torch.Tensor) -> list[int]:
        """Where each image begins in the flattened batch.

        Raises: ValueError when images and image positions do not match.
        """
        lengths = [self.config.image_tokens] * len(pixel_values)
        return image_starts(self.image_index(input_ids_BT).tolist(), lengths, num_tokens=input_ids_BT.shape[1])

    def embed_with_images(self, input_ids_BT: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, T, D) of text and images.

        Raises: ValueError when images and image positions do not match.
        """
        starts = self.find_image_starts(input_ids_BT, pixel_values)
        features_MPD = self.get_image_features(pixel_values).last_hidden_state
        return join_text_and_images(self.get_input_embeddings(), input_ids_BT, list(features_MPD), starts)

    def _expand_inputs_for_generation(  # type: ignore[override]  # transformers calls it by keyword
        self, expand_size: int = 1, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and input_ids is not None and expand_size > 1:
            num_samples, num_tokens = input_ids.shape
            starts = self.find_image_starts(input_ids, pixel_values)
            counts = images_per_sample(starts, num_samples=num_samples, num_tokens=num_tokens)
            pixel_values = dealt_out(pixel_values, counts, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size,
            input_ids=input_ids,  # type: ignore[arg-type]
            **kwargs,
        )
        return input_ids, kwargs if pixel_values is None else {**kwargs, "pixel_values": pixel_values}
