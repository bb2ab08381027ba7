"""Questions or conversations, and images of any size -> the keyword arguments of XComposer2-4KHD and -2.5.

As for XComposer2, but that an image takes as many positions as its tiles make, and that a lone image without a
placeholder goes in front of everything, the system turn too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.chat import IMAGE_PLACEHOLDER
from vlm.checkpoint import read_checkpoint, read_json
from vlm.image_pixels import ImageInput
from vlm.internlm_xcomposer2.processing import IMAGE_PIECE, XComposer2Processor
from vlm.internlm_xcomposer2.tokenization import InternLM2Tokenizer
from vlm.internlm_xcomposer2_hd.configuration import InternLMXComposer2HDConfig
from vlm.internlm_xcomposer2_hd.facts import ARCHITECTURE, completed
from vlm.internlm_xcomposer2_hd.image_processing import tile_pixels
from vlm.internlm_xcomposer2_hd.tiling import Tiling
from vlm.processing import Conversation, PreparedImage, config_from, refuse_other_tokenizer


class XComposer2HDProcessor(XComposer2Processor):
    """Tokenizer, tiling and image token id of one model; called as `XComposer2Processor`, it adds `image_tiles`.

    `image_tiles` (images, 2) are the rows and columns of tiles; `pixel_values` has a row for each tile and each whole.
    """

    def __init__(self, tokenizer: InternLM2Tokenizer, *, tiling: Tiling, image_token_id: int | None = None) -> None:
        super().__init__(tokenizer, img_size=tiling.tile_px, patch_size=1, image_token_id=image_token_id)
        self.tiling = tiling

    @classmethod
    def from_folder(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> XComposer2HDProcessor:
        """The processor of a model folder, from its config.json, weight headers and tokenizer.model.

        Raises: SourceError when one is missing, unreadable or contradicts another.
        """
        file = Path(path) / "config.json"
        values = config or read_json(file)
        if ARCHITECTURE not in values.get("architectures", []):
            tensors = read_checkpoint(Path(path)).tensors
            values = completed(values, {name: header.shape for name, header in tensors.items()}, str(path))
        tokenizer = InternLM2Tokenizer.from_folder(path)
        values = {"image_token_id": tokenizer.id_of(IMAGE_PIECE), **values}
        made = config_from(InternLMXComposer2HDConfig, values, file)
        refuse_other_tokenizer(tokenizer.vocab_size, made.vocab_size, "vocab_size", path)
        return cls(tokenizer, tiling=made.tiling, image_token_id=made.image_token_id)

    def _prepared(self, image: ImageInput, num_images: int) -> PreparedImage:
        pixels, tiles = tile_pixels(image, self.tiling, num_images=num_images)
        (image_id,) = self.image_ids
        return PreparedImage(pixels=pixels, ids=[image_id] * self.tiling.num_positions(*tiles), tiles=tiles)

    def _text(self, prompt: Conversation, num_images: int, chat: bool) -> str:
        text = self._written(prompt, chat)
        return IMAGE_PLACEHOLDER + text if num_images == 1 and IMAGE_PLACEHOLDER not in text else text
