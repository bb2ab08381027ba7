"""What a picture of any size amounts to: patches for the encoder, positions in the prompt. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlm.internlm_xcomposer2_hd.tiling import Tiling


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRule:
    """What one image amounts to: patches for the encoder, positions in the prompt.

    A model of fixed images has one answer. For one that takes any size the answer is per cell of `cell_px` pixels a
    side, in a picture of `native_px` (width, height) unless another size is asked for; or `tiling` cuts the picture,
    and the answer is that of one tile. Otherwise the answer holds for `native_px` alone.
    """

    native_px: tuple[int, int]
    any_size: bool
    cell_px: int | None
    patches: int
    tokens: int
    tiling: Tiling | None = None

    def counts(self, image_size: tuple[int, int] | None, num_images: int = 1) -> tuple[int, int] | None:
        """Patches and positions of one of so many images of this (width, height); None when only a trace can tell."""
        width, height = image_size or self.native_px
        if self.tiling is not None:
            rows, columns = self.tiling.grid(width, height, num_images=num_images)
            return (rows * columns + 1) * self.patches, self.tiling.num_positions(rows, columns)
        if self.any_size and self.cell_px is not None:
            cells = max(1, round(width / self.cell_px)) * max(1, round(height / self.cell_px))
            return cells * self.patches, cells * self.tokens
        if self.any_size and (width, height) != self.native_px:
            return None
        return self.patches, self.tokens

    def smaller(self, image_size: tuple[int, int] | None, num_images: int = 1) -> Iterator[tuple[int, int]]:
        """Pictures of the same shape with sides of seven eighths and less that amount to less, the largest first."""
        width, height = image_size or self.native_px
        least = self.tiling.tile_px if self.tiling else self.cell_px
        if not self.any_size or least is None:
            return
        known = self.counts(image_size, num_images)
        for eighths in range(7, 0, -1):
            size = max(least, width * eighths // 8), max(least, height * eighths // 8)
            counts = self.counts(size, num_images)
            if counts != known:
                yield size
            known = counts
