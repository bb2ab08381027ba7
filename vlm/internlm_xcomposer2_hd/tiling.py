"""How an image of any size is cut into tiles, and how many positions they take. Numbers only: no pixels, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The rule of one model. `positions_per_side` are those of one tile, four patches in each.

    `max_tiles` bounds rows x columns of a lone image, `max_tiles_of_several` that of each of several. Only a model
    that `upscales` gives a small image more tiles than its own size fills. White rows go below, or to both sides where
    `centred`.
    """

    tile_px: int
    positions_per_side: int
    max_tiles: int
    max_tiles_of_several: int
    upscales: bool = False
    centred: bool = False

    @property
    def positions_per_tile(self) -> int:
        return self.positions_per_side**2

    @property
    def patches_per_tile(self) -> int:
        return 4 * self.positions_per_tile

    def resized(self, width_px: int, height_px: int, *, max_tiles: int) -> tuple[int, int]:
        """Width and height in pixels to which an image is scaled, its longer side a whole number of tiles.

        A side that would vanish is one pixel.
        Source: mbzuai-oryx/GeoPixel:model/IXC/ixc_utils.py; 4KHD's, which upscales, VLMEvalKit's xcomposer2_4KHD.
        """
        longer, shorter = max(width_px, height_px), min(width_px, height_px)
        ratio = longer / shorter
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= max_tiles:
            columns += 1
        if not self.upscales:
            columns = min(math.ceil(longer / self.tile_px), columns)
        new_longer = columns * self.tile_px
        new_shorter = max(1, int(new_longer / ratio))
        return (new_shorter, new_longer) if width_px < height_px else (new_longer, new_shorter)

    def grid(self, width_px: int, height_px: int, *, num_images: int = 1) -> tuple[int, int]:
        """Rows and columns of tiles of an image of that size, one of `num_images` in a prompt."""
        width, height = self.resized(width_px, height_px, max_tiles=self.tiles_allowed(num_images))
        return math.ceil(height / self.tile_px), math.ceil(width / self.tile_px)

    def tiles_allowed(self, num_images: int) -> int:
        """Tiles that one of `num_images` in a prompt may have."""
        return self.max_tiles if num_images == 1 else self.max_tiles_of_several

    def num_positions(self, rows: int, columns: int) -> int:
        """Positions of an image of rows x columns tiles: those of the whole view and of every tile, a newline for each
        row of both, and a separator.
        """
        newlines = (rows + 1) * self.positions_per_side
        return (rows * columns + 1) * self.positions_per_tile + 1 + newlines
