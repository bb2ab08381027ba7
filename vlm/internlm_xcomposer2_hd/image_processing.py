"""An image file or Pillow image -> the tiles of the vision encoder, and how many rows and columns of them.

The arithmetic of the official code: Pillow's bilinear resize, white rows, CLIP's normalisation, and for the view of the
whole torch's bicubic interpolation of the normalised pixels.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch.nn import functional as F

from vlm.image_pixels import ImageInput, as_rgb, normalised
from vlm.internlm_xcomposer2_hd.tiling import Tiling


def tile_pixels(image: ImageInput, tiling: Tiling, *, num_images: int = 1) -> tuple[torch.Tensor, tuple[int, int]]:
    """Normalised pixels (1 + rows * columns, 3, S, S) in float32: the whole, then its tiles row by row; and the grid.

    Raises: as `vlm.image_pixels.pixel_values`.
    """
    pixels = normalised(_padded(as_rgb(image), tiling, tiling.tiles_allowed(num_images)))
    side = tiling.tile_px
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    whole = F.interpolate(pixels, size=(side, side), mode="bicubic")
    tiles = pixels[0].unflatten(1, (rows, side)).unflatten(3, (columns, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([whole, tiles]), (rows, columns)


def _padded(rgb: Image.Image, tiling: Tiling, max_tiles: int) -> Image.Image:
    """The image scaled, on as few white tiles as hold it. A portrait lies on its side meanwhile, as officially."""
    upright = rgb.width < rgb.height
    lying = rgb.transpose(Image.Transpose.TRANSPOSE) if upright else rgb
    width, height = tiling.resized(lying.width, lying.height, max_tiles=max_tiles)
    scaled = lying.resize((width, height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (width, -(-height // tiling.tile_px) * tiling.tile_px), "white")
    canvas.paste(scaled, (0, (canvas.height - height) // 2 if tiling.centred else 0))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if upright else canvas
