"""Tiles of images -> one sequence of features per image. It does not know the language model.

Shapes: S tile size in pixels, G patches per side of a tile, P positions of an image, C width of the vision tower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vlm.internlm_xcomposer2.vision import VisionEncoder


class TiledVisionEncoder(VisionEncoder):
    """Images cut into tiles -> one sequence of merged patches each, its rows ended by a learned newline.

    Four neighbouring patches become one position of four times the width. An image is a view of the whole, a learned
    separator, and the mosaic of its tiles.
    """

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        grids: Sequence[tuple[int, int]],
        separator_11C: torch.Tensor,
        newline_111C: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Features (P, 4C) per image; `pixel_values` (tiles, 3, S, S) are each image's whole view, then its tiles.

        As in the official code nothing is moved: newline and separator are joined to what the tower returns.
        """
        merged = merge_patches(super().forward(pixel_values))
        sequences = []
        for (rows, columns), tiles in zip(grids, merged.split([1 + r * c for r, c in grids]), strict=True):
            mosaic = tiles[1:].unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            whole = with_newlines(tiles[0], newline_111C)
            sequences.append(torch.cat([whole, separator_11C[0], with_newlines(mosaic, newline_111C)]))
        return sequences


def merge_patches(features: torch.Tensor) -> torch.Tensor:
    """Squares of four patches side by side in one position: (tiles, G * G, C) -> (tiles, G/2, G/2, 4C)."""
    half = math.isqrt(features.shape[1]) // 2
    return features.unflatten(1, (half, 2, half, 2)).transpose(2, 3).flatten(3)


def with_newlines(rows: torch.Tensor, newline_111C: torch.Tensor) -> torch.Tensor:
    """A grid of features (rows, columns, C) as one sequence, each row with a newline at its end."""
    return torch.cat([rows, newline_111C[0].expand(len(rows), 1, -1)], dim=1).flatten(0, 1)
