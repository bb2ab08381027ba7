"""An image file or Pillow image -> the pixel tensor of a vision encoder.

The same arithmetic as the official codes: Pillow's bicubic resize to a square, then CLIP's mean and deviation. Like
there, transparency is dropped, not blended, and a camera's orientation mark is not applied.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from planner.errors import SourceError

# Source: openai/clip-vit-large-patch14-336, preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ImageInput = str | Path | Image.Image


def pixel_values(image: ImageInput, *, img_size: int) -> torch.Tensor:
    """Normalised pixels (1, 3, img_size, img_size) in float32.

    Raises: SourceError when a file is missing, no image, cut off or larger than Pillow dares to decode;
            TypeError for anything but a path or a Pillow image.
    """
    return normalised(as_rgb(image).resize((img_size, img_size), Image.Resampling.BICUBIC))


def normalised(rgb: Image.Image) -> torch.Tensor:
    """CLIP's normalised pixels (1, 3, height, width) in float32 of an RGB image."""
    # A bytearray because torch warns about memory it may not write to.
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    pixels = flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return pixels.sub(mean).div(std).unsqueeze(0)


def as_rgb(image: ImageInput) -> Image.Image:
    """An RGB image in memory.

    Raises: as `pixel_values`.
    """
    if isinstance(image, Image.Image):
        return _converted(image, "the given image")
    if not isinstance(image, str | Path):
        raise TypeError(f"an image is a path or a Pillow image, not {type(image).__name__}")
    where = f"image {str(image)!r}"
    try:
        with Image.open(image) as opened:
            return _converted(opened, where)
    except UnidentifiedImageError as error:
        raise SourceError(f"{where} is in no image format that Pillow knows. Give a PNG, JPEG or WebP file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SourceError(
            f"{where} is too large to decode safely: {error}. Scale it down; no model sees that much of it anyway"
        ) from error
    except OSError as error:
        if error.filename is not None:
            raise SourceError(f"{where} cannot be opened: {error.strerror}. Check the path") from error
        raise SourceError(f"{where} is damaged: {error}. It may be cut off; download it again") from error
    except (SyntaxError, ValueError, RuntimeError) as error:
        # What Pillow's readers raise for broken contents, by format, found by reading damaged files.
        raise SourceError(f"{where} is damaged: {error}. Download it again") from error


def _converted(image: Image.Image, where: str) -> Image.Image:
    if not image.width or not image.height:
        raise ValueError(f"{where} is {image.width}x{image.height} pixels: both sides must be at least 1")
    # Straight to RGB, Pillow warns of a palette's transparency; by way of RGBA the colours are the same.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
