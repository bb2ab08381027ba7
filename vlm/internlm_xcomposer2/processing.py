"""Questions or conversations, and images -> the keyword arguments of our InternLM2 and InternLM-XComposer2 models.

An image is a square, and takes one position per patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from vlm.checkpoint import read_checkpoint, read_json
from vlm.image_pixels import ImageInput, pixel_values
from vlm.internlm_xcomposer2.chat import CHAT
from vlm.internlm_xcomposer2.facts import InternLM2Facts
from vlm.internlm_xcomposer2.planned import architecture_of_layout
from vlm.internlm_xcomposer2.tokenization import InternLM2Tokenizer
from vlm.processing import PreparedImage, Processor, refuse_other_tokenizer

# The piece whose positions images take when config.json does not name another: no text can contain it by accident.
IMAGE_PIECE = "[UNUSED_TOKEN_0]"


class XComposer2Processor(Processor):
    """Tokenizer, image size and image token id of one model; `img_size` None is a text-only model."""

    chat = CHAT

    def __init__(
        self,
        tokenizer: InternLM2Tokenizer,
        *,
        img_size: int | None,
        patch_size: int = 14,
        image_token_id: int | None = None,
    ) -> None:
        if img_size is not None and (img_size < patch_size or img_size % patch_size):
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.img_size = img_size
        self.num_image_tokens = 0 if img_size is None else (img_size // patch_size) ** 2
        self.image_token_id = tokenizer.id_of(IMAGE_PIECE) if image_token_id is None else image_token_id
        if self.image_token_id is None and img_size is not None:
            raise ValueError(f"no image_token_id: none was given and the tokenizer has no piece {IMAGE_PIECE}")
        has_images = img_size is not None and self.image_token_id is not None
        super().__init__(tokenizer, image_ids=frozenset([self.image_token_id] if has_images else []))

    @classmethod
    def from_folder(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> XComposer2Processor:
        """The processor of a model folder, from its config.json and tokenizer.model.

        Raises: SourceError when either is missing, unreadable or contradicts the other.
        """
        file = Path(path) / "config.json"
        config = config or read_json(file)
        # Where the config names no class, the weights' names decide, as they do for planning.
        named = config.get("architectures") or [architecture_of_layout(read_checkpoint(Path(path)).tensors)]
        facts = InternLM2Facts.from_config({**config, "architectures": named}, str(file))
        tokenizer = InternLM2Tokenizer.from_folder(path)
        refuse_other_tokenizer(tokenizer.vocab_size, facts.vocab_size, "vocab_size", path)
        if facts.vision is None:
            return cls(tokenizer, img_size=None)
        image_token_id = config.get("image_token_id", tokenizer.id_of(IMAGE_PIECE))
        if type(image_token_id) is not int or not 0 <= image_token_id < facts.vocab_size:
            raise SourceError(
                f"{file}: image_token_id is {image_token_id!r}; it must be an id below vocab_size {facts.vocab_size}"
            )
        vision = facts.vision
        return cls(tokenizer, img_size=vision.image_size, patch_size=vision.patch_size, image_token_id=image_token_id)

    def _prepared(self, image: ImageInput, num_images: int) -> PreparedImage:
        assert self.img_size is not None and self.image_token_id is not None  # or _refuse_wrong_counts has refused
        pixels = pixel_values(image, img_size=self.img_size)
        return PreparedImage(pixels=pixels, ids=[self.image_token_id] * self.num_image_tokens)
