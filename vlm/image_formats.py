"""The forms in which vision-language models take their images, one function each, named after the form.

The parameter names of a forward and of its vision function give the form away. A form may leave the exact layout open;
then its function yields the possible ones, the usual one first, and whoever has the model tries them. Pixels are noise;
grids, sizes, masks and indices mean what they say. How many positions an image takes is not known here.

Shapes: B samples, I images per sample, N = B x I images, C channels, G patches per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution

from planner.errors import UnsupportedModelError
from planner.units import GIB, format_bytes

Pixels = dict[str, Tensor]

DEFAULT_SIDE_PX = 448
"""Side of an image for models that take any size."""
MAX_PIXEL_BYTES = 8 * GIB
"""Most that a host is asked for: a thousand images of 846 x 846 pixels in float32."""

POOLED_SIDE = 2
"""Patches per side that a position averages where the input says so: a processor's default, absent from the config."""

_MERGES = ("spatial_merge_size", "merge_size", "downsample_factor", "scale_factor", "pooling_kernel_size")
_MERGE_KERNELS = ("merge_kernel_size", "window_kernel_size")
_MERGE_RATIOS = ("downsample_ratio", "pixel_shuffle_ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """Images that are asked for, and what the model says about the form it wants them in.

    `parameters` are the names that the forward and the vision function take, `required` those without which the vision
    function cannot work. Height and width are in pixels.
    """

    config: PreTrainedConfig
    parameters: frozenset[str]
    required: frozenset[str]
    batch_size: int
    num_images: int
    generator: torch.Generator
    height: int = 0
    width: int = 0

    @property
    def vision(self) -> PreTrainedConfig:
        """The level of the config that speaks of patches or image sizes; its root when there is no vision part."""
        with_images = [
            one for one in levels(self.config) if {"patch_size", "image_size", "resolution"} & vars(one).keys()
        ]
        return next(
            (one for one in with_images if one is not self.config and "audio" not in one.model_type), self.config
        )

    @property
    def total_images(self) -> int:
        return self.batch_size * self.num_images

    @property
    def patch_px(self) -> int:
        patch = setting(self.vision, "patch_size") or setting(self.config, "patch_size") or 16
        return as_pair(patch)[0]

    @property
    def channels(self) -> int:
        return setting(self.vision, "num_channels", "in_channels") or 3

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch_px**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch_px, self.width // self.patch_px

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def merge_factor(self) -> int:
        """Patches per side that end up in one position, or a multiple of that."""
        factors = [setting(self.config, name) for name in _MERGES]
        factors += [as_pair(kernel)[0] for name in _MERGE_KERNELS if (kernel := setting(self.config, name))]
        factors += [round(1 / ratio) for name in _MERGE_RATIOS if (ratio := setting(self.config, name))]
        factors += [2] * (("insert_layer_id" in vars(self.vision)) + ("image_merge_sizes" in self.parameters))
        return math.prod(factor for factor in factors if isinstance(factor, int))

    @property
    def step_px(self) -> int:
        """Sizes that the model can merge are multiples of this."""
        return self.patch_px * self.merge_factor

    def noise(self, *shape: int) -> Tensor:
        num_bytes = 4 * math.prod(shape)
        if num_bytes > MAX_PIXEL_BYTES:
            raise UnsupportedModelError(
                f"the pixels of {self.total_images} images would take {format_bytes(num_bytes)} of host memory: at "
                f"most {format_bytes(MAX_PIXEL_BYTES)} are made. Ask for fewer or smaller images, or a smaller batch."
            )
        return torch.rand(shape, generator=self.generator) * 2 - 1

    def per_image(self, *row: int, dtype: torch.dtype = torch.long) -> Tensor:
        """The same row for every image."""
        return torch.tensor([row] * self.total_images, dtype=dtype)


def levels(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and its sub-configs, outer before inner."""
    yield config
    for name in config.sub_configs:
        if isinstance(sub_config := getattr(config, name, None), PreTrainedConfig):
            yield from levels(sub_config)


def setting(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these settings that the config or a sub-config gives. Read past attribute maps and layer views."""
    values = (vars(level).get(name) for level in levels(config) for name in names)
    return next((value for value in values if value is not None), None)


def as_pair(value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """Height and width of a size that may be given as one number."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _packed_patches(request: ImageRequest) -> Iterator[Pixels]:
    """Patches of all images in one sequence, and each image's grid."""
    rows, columns = request.grid
    count, side, values = request.total_images * rows * columns, request.patch_px, request.patch_values
    frames = setting(request.config, "temporal_patch_size", "patch_temporal") or 1
    rest = {"image_grid_thw": request.per_image(1, rows, columns)}
    if "image_merge_sizes" in request.parameters:
        rest["image_merge_sizes"] = torch.full((request.total_images,), 2)
    for shape in (
        (count, frames * values),
        (count, values),
        (count, request.channels, side, side),
        (1, count, request.channels, side, side),
    ):
        yield {"pixel_values": request.noise(*shape), **rest}
    merge = setting(request.config, "spatial_merge_size") or 1
    merged = {"image_grid_thw": request.per_image(1, rows // merge, columns // merge)}
    shape = (count // merge**2, merge * side, merge * side, request.channels)
    yield {"pixel_values": request.noise(*shape), **merged}


def _packed_flat_patches(request: ImageRequest) -> Iterator[Pixels]:
    """Patches of all images in one sequence, and each image's height and width in patches."""
    rows, columns = request.grid
    pixels = request.noise(request.total_images * rows * columns, request.patch_values)
    yield {"pixel_values": pixels, "image_grid_hw": request.per_image(rows, columns)}


def _padded_patches(request: ImageRequest) -> Iterator[Pixels]:
    """Patches per image, padded to one length, with a mask."""
    rows, columns = request.grid
    yield {
        "pixel_values": request.noise(request.total_images, rows * columns, request.patch_values),
        "spatial_shapes": request.per_image(rows, columns),
        "pixel_attention_mask": torch.ones(request.total_images, rows * columns, dtype=torch.long),
    }


def _patch_strip(request: ImageRequest) -> Iterator[Pixels]:
    """All patches of all images side by side in one image that is one patch high."""
    rows, columns = request.grid
    pixels = request.noise(
        1, request.channels, request.patch_px, request.total_images * rows * columns * request.patch_px
    )
    yield {"pixel_values": pixels, "target_sizes": request.per_image(rows, columns, dtype=torch.int32)}


def _positions(request: ImageRequest) -> Tensor:
    """Row and column of every patch, (G, 2)."""
    rows, columns = request.grid
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)


def _positioned_patches(request: ImageRequest) -> Iterator[Pixels]:
    """Patches with their column and row; some models want a patch to be what others pool afterwards."""
    ids = _positions(request).flip(-1).expand(request.total_images, -1, -1).clone()
    merge = setting(request.config, "pooling_kernel_size") or 1
    for values in (request.patch_values, request.patch_values * merge**2):
        yield {"pixel_values": request.noise(*ids.shape[:2], values), "image_position_ids": ids}


def _pooled_patches(request: ImageRequest) -> Iterator[Pixels]:
    """Patches, and for each position the indices of those that it averages, -1 where the image ends."""
    rows, columns = request.grid
    pooled = math.ceil(rows / POOLED_SIDE), math.ceil(columns / POOLED_SIDE)
    padding = (0, pooled[1] * POOLED_SIDE - columns, 0, pooled[0] * POOLED_SIDE - rows)
    indices = nn.functional.pad(torch.arange(rows * columns).reshape(rows, columns), padding, value=-1)
    indices = (
        indices.unfold(0, POOLED_SIDE, POOLED_SIDE).unfold(1, POOLED_SIDE, POOLED_SIDE).reshape(-1, POOLED_SIDE**2)
    )
    shifts = torch.arange(request.total_images)[:, None, None] * rows * columns
    yield {
        "pixel_values": request.noise(request.total_images, rows * columns, request.patch_values),
        "image_token_pooling": torch.where(indices < 0, indices, indices + shifts).flatten(0, 1),
        "image_grids": request.per_image(*pooled, 0, 0),
        "image_num_crops": torch.ones(request.total_images, dtype=torch.long),
    }


def _addressed_patches(request: ImageRequest) -> Iterator[Pixels]:
    """Patches whose first two values are their row and column, counted from 1; one image per sample."""
    address = (_positions(request) + 1.0).expand(request.batch_size, -1, -1)
    pixels = request.noise(*address.shape[:2], request.patch_values)
    sizes = {"width": request.width, "height": request.height}
    given = {name: torch.full((request.batch_size,), px) for name, px in sizes.items() if name in request.parameters}
    yield {"flattened_patches": torch.cat([address, pixels], dim=-1), **given}


def _sample_patches(request: ImageRequest) -> Iterator[Pixels]:
    """Patches of all images of a sample in its own sequence."""
    count = request.num_images * math.prod(request.grid)
    yield {"pixel_values": request.noise(request.batch_size, count, request.patch_values)}


def _aspect_ratio_tiles(request: ImageRequest) -> Iterator[Pixels]:
    """Tiles per image up to a maximum, with the arrangement's number; here the first one, a single tile."""
    tiles = setting(request.vision, "max_num_tiles") or 1
    mask = torch.zeros(request.batch_size, request.num_images, tiles, dtype=torch.long)
    mask[..., 0] = 1
    yield {
        "pixel_values": request.noise(*mask.shape, *request.image_shape),
        "aspect_ratio_ids": torch.ones(mask.shape[:2], dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def _tiles(request: ImageRequest) -> Iterator[Pixels]:
    """An overview and the tiles of the arrangement that suits the image's size best."""
    tile_px = as_pair(setting(request.vision, "image_size"))[0]
    best = select_best_resolution((request.height, request.width), request.config.image_grid_pinpoints)
    several = "batch_num_images" in request.parameters and request.num_images > 1
    count = 1 if several else 1 + (best[0] // tile_px) * (best[1] // tile_px)
    given = {"batch_num_images": torch.full((request.batch_size,), request.num_images)} if several else {}
    yield {
        "pixel_values": request.noise(request.total_images, count, request.channels, tile_px, tile_px),
        "image_sizes": request.per_image(request.height, request.width),
        **given,
    }


def _grid_of_tiles(request: ImageRequest) -> Iterator[Pixels]:
    """An overview and the tiles of each image, as the configuration's own tiling cuts it, and their arrangement."""
    tiling = request.config.tiling
    rows, columns = tiling.grid(request.width, request.height, num_images=request.num_images)
    count = request.total_images * (1 + rows * columns)
    yield {
        "pixel_values": request.noise(count, request.channels, tiling.tile_px, tiling.tile_px),
        "image_tiles": request.per_image(rows, columns),
    }


def _sized_images(request: ImageRequest) -> Iterator[Pixels]:
    """Images padded to one size, and the size of each."""
    pixels = request.noise(request.total_images, *request.image_shape)
    yield {"pixel_values": pixels, "image_sizes": request.per_image(request.height, request.width)}


def _masked_images(request: ImageRequest, *, per_pixel: bool = True) -> Iterator[Pixels]:
    """Images per sample, and a mask of their pixels or of the images that are not padding."""
    pixels = request.noise(request.batch_size, request.num_images, *request.image_shape)
    if per_pixel:
        mask = torch.ones(*pixels.shape[:2], request.height, request.width, dtype=torch.bool)
        yield {"pixel_values": pixels, "pixel_attention_mask": mask}
    yield {"pixel_values": pixels, "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.bool)}


def _two_resolutions(request: ImageRequest) -> Iterator[Pixels]:
    """Each image in two sizes for two encoders."""
    high = as_pair(setting(request.config.high_res_vision_config, "image_size"))
    pixels = request.noise(request.total_images, *request.image_shape)
    yield {
        "pixel_values": pixels,
        "high_res_pixel_values": request.noise(request.total_images, request.channels, *high),
    }


def _images_per_sample(request: ImageRequest) -> Iterator[Pixels]:
    yield {"pixel_values": request.noise(request.batch_size, request.num_images, *request.image_shape)}


def _images(request: ImageRequest, name: str = "pixel_values") -> Iterator[Pixels]:
    """Images of one size, all in one batch or per sample."""
    yield {name: request.noise(request.total_images, *request.image_shape)}
    yield {name: request.noise(request.batch_size, request.num_images, *request.image_shape)}


def _text_only(request: ImageRequest) -> Iterator[Pixels]:
    yield {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """A form of images: the parameter names that give it away, its layouts, and whether any image size will do."""

    names: frozenset[str]
    layouts: Callable[[ImageRequest], Iterator[Pixels]]
    any_size: bool


def _format(*names: str, layouts: Callable[[ImageRequest], Iterator[Pixels]], any_size: bool = False) -> ImageFormat:
    return ImageFormat(names=frozenset(names), layouts=layouts, any_size=any_size)


TILES = _format("image_sizes", layouts=_tiles, any_size=True)
GRID_OF_TILES = _format("image_tiles", layouts=_grid_of_tiles, any_size=True)
SIZED_IMAGES = _format("image_sizes", layouts=_sized_images, any_size=True)
FORMATS = (
    GRID_OF_TILES,
    _format("image_grid_thw", layouts=_packed_patches, any_size=True),
    _format("image_grid_hw", layouts=_packed_flat_patches, any_size=True),
    _format("spatial_shapes", layouts=_padded_patches, any_size=True),
    _format("target_sizes", layouts=_patch_strip, any_size=True),
    _format("image_position_ids", layouts=_positioned_patches, any_size=True),
    _format("image_token_pooling", layouts=_pooled_patches),
    _format("flattened_patches", layouts=_addressed_patches, any_size=True),
    _format("image_patches", layouts=_sample_patches, any_size=True),
    _format("aspect_ratio_ids", layouts=_aspect_ratio_tiles),
    _format("image_attention_mask", layouts=_images_per_sample),
    _format("state", "pixel_attention_mask", layouts=partial(_masked_images, per_pixel=False)),
    _format("pixel_attention_mask", layouts=_masked_images),
    _format("high_res_pixel_values", layouts=_two_resolutions),
    _format("pixel_values_images", layouts=partial(_images, name="pixel_values_images")),
    _format("pixel_values", layouts=_images),
    _format(layouts=_text_only),
)
"""The most telling names first: most forwards also take `pixel_values`, and the last form needs no name."""


def image_format(request: ImageRequest) -> ImageFormat:
    """The form that the model's parameter names give away. `image_sizes` says something only where it is required."""
    if "image_sizes" in request.required:
        return TILES if setting(request.config, "image_grid_pinpoints") else SIZED_IMAGES
    return next(one for one in FORMATS if one.names <= request.parameters)


def fitted_size(request: ImageRequest, asked: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width in pixels: what was asked for in steps that the model can merge, or its one fixed size."""
    native = setting(request.vision, "image_size", "resolution")
    form = image_format(request)
    if native is not None and not form.any_size:
        return as_pair(native)
    height, width = as_pair(asked or native or DEFAULT_SIDE_PX)
    step = 1 if form in (TILES, GRID_OF_TILES) else request.step_px
    return max(step, round(height / step) * step), max(step, round(width / step) * step)
