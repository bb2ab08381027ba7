"""InternLM-XComposer2-4KHD and -2.5 as transformers models: token ids and tiles -> logits, with `generate`.

Parameter names are the official ones. It does not know where the modules are: nothing here moves a tensor to a device.

Shapes: B batch, T tokens, V vocabulary, M images in the batch, S tile size in pixels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from vlm.image_positions import dealt_out, ids_for_images, image_starts, images_per_sample, join_text_and_images
from vlm.internlm_xcomposer2.modeling import (
    InternLM2ForCausalLM,
    InternLMXComposer2ForCausalLM,
    build_projector,
)
from vlm.internlm_xcomposer2.plora import INFER_MODES, Linears, TaskLoRALinear
from vlm.internlm_xcomposer2_hd.configuration import InternLMXComposer2HDConfig
from vlm.internlm_xcomposer2_hd.vision import TiledVisionEncoder


class InternLMXComposer2HDForCausalLM(InternLMXComposer2ForCausalLM):
    """XComposer2 for images of any size, cut into tiles.

    Images come as `pixel_values` (tiles, 3, S, S), of each image first the view of the whole, then its tiles row by
    row, and `image_tiles` (M, 2), the rows and columns of each. Their positions in `input_ids` are runs of
    `config.image_token_id`, `config.tiling.num_positions(rows, columns)` long.
    """

    config_class = InternLMXComposer2HDConfig
    config: InternLMXComposer2HDConfig

    @staticmethod
    def _linears(config: InternLMXComposer2HDConfig) -> Linears:  # type: ignore[override]
        build = partial(TaskLoRALinear, task_ranks=config.task_loras)
        return Linears(
            packed=partial(build, rank=config.plora_wqkv_rank, alpha=config.plora_wqkv_alpha),
            other=partial(build, rank=config.plora_rank, alpha=config.plora_alpha),
        )

    def _add_vision(self, config: InternLMXComposer2HDConfig) -> None:  # type: ignore[override]
        clip_config = config.clip_config()
        clip_config._attn_implementation = config._attn_implementation
        # Bare parameters of the root, as in the official model: the first of them is what `model.device` reads.
        self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, config.merged_width))
        self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, config.merged_width))
        self.vit = TiledVisionEncoder(clip_config)
        self.vision_proj = build_projector(config.merged_width, config.hidden_size)
        if config.video_mem_width:
            self.video_mem_proj = build_projector(config.video_mem_width, config.hidden_size)

    def set_infer_mode(self, mode: str) -> None:
        """Use the LoRAs of a task from now on: "base" none, "write" and "web" those of XComposer2.5.

        Raises: ValueError for an unknown mode, or one whose LoRAs this model does not have.
        """
        if mode not in INFER_MODES:
            raise ValueError(f"infer_mode is {mode!r}: known are {', '.join(INFER_MODES)}")
        missing = [name for name in INFER_MODES[mode] if name not in self.config.task_loras]
        if missing:
            raise ValueError(f"infer_mode {mode!r} needs LoRAs that this model lacks: {', '.join(missing)}. Use 'base'")
        for module in self.modules():
            if isinstance(module, TaskLoRALinear):
                module.active = INFER_MODES[mode]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        im_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_tiles: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits as of `InternLM2ForCausalLM`.

        Raises: ValueError when tiles, images and their positions do not match, or come with the wrong others.
        """
        shared = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        if pixel_values is None:
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, im_mask=im_mask, **shared)
        ids = ids_for_images(input_ids, inputs_embeds, im_mask)
        embeddings = self._embed_with_tiles(ids, pixel_values, image_tiles)
        # The language model's own forward: the parent's would take the pixels for whole images.
        return InternLM2ForCausalLM.forward(self, inputs_embeds=embeddings, image_index=self.image_index(ids), **shared)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """transformers' inputs of one step; the tiles' grids go where the tiles go."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if "pixel_values" not in inputs:
            inputs.pop("image_tiles", None)
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]  # transformers calls it by keyword
        self, expand_size: int = 1, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        images: dict[str, Any] = {name: kwargs.pop(name) for name in ("pixel_values", "image_tiles") if name in kwargs}
        if expand_size > 1 and input_ids is not None and images.get("pixel_values") is not None:
            grids = grids_of(images.get("image_tiles"), images["pixel_values"])
            num_samples, num_tokens = input_ids.shape
            counts = images_per_sample(self._starts(input_ids, grids), num_samples=num_samples, num_tokens=num_tokens)
            tiles = iter([1 + rows * columns for rows, columns in grids])
            tile_counts = [sum(next(tiles) for _ in range(count)) for count in counts]
            images["image_tiles"] = dealt_out(images["image_tiles"], counts, expand_size)
            images["pixel_values"] = dealt_out(images["pixel_values"], tile_counts, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        return input_ids, {**kwargs, **images}

    def get_image_features(  # type: ignore[override]
        self, pixel_values: torch.Tensor, image_tiles: torch.Tensor, **kwargs: Any
    ) -> BaseModelOutput:
        """Features of all images' positions, one image after the other (P, D)."""
        grids = grids_of(image_tiles, pixel_values)
        sequences = self.vit(pixel_values, grids, self.plora_glb_GN, self.plora_sub_GN)
        return BaseModelOutput(last_hidden_state=self.vision_proj(torch.cat(sequences)))

    def _embed_with_tiles(
        self, input_ids_BT: torch.Tensor, pixel_values: torch.Tensor, image_tiles: torch.Tensor | None
    ) -> torch.Tensor:
        grids = grids_of(image_tiles, pixel_values)
        starts = self._starts(input_ids_BT, grids)
        features_PD = self.get_image_features(pixel_values, image_tiles).last_hidden_state
        features = features_PD.split(self._lengths(grids))
        return join_text_and_images(self.model.tok_embeddings, input_ids_BT, features, starts)

    def _lengths(self, grids: list[tuple[int, int]]) -> list[int]:
        return [self.config.tiling.num_positions(rows, columns) for rows, columns in grids]

    def _starts(self, input_ids_BT: torch.Tensor, grids: list[tuple[int, int]]) -> list[int]:
        positions = self.image_index(input_ids_BT).tolist()
        return image_starts(positions, self._lengths(grids), num_tokens=input_ids_BT.shape[1])


def grids_of(image_tiles: torch.Tensor | None, pixel_values: torch.Tensor) -> list[tuple[int, int]]:
    """Rows and columns of each image's tiles.

    Raises: ValueError when they are missing, not positive, or of another number of tiles than there are.
    """
    if image_tiles is None:
        raise ValueError(
            "pixel_values are tiles: image_tiles must say how many rows and columns of them each image has"
        )
    grids = [(rows, columns) for rows, columns in image_tiles.tolist()]
    expected = sum(1 + rows * columns for rows, columns in grids)
    if expected != len(pixel_values) or any(min(grid) < 1 for grid in grids):
        raise ValueError(
            f"pixel_values are {len(pixel_values)} tiles, but image_tiles {grids} make {expected}: "
            "one for the whole of each image and one for each row and column, both at least 1"
        )
    return grids
