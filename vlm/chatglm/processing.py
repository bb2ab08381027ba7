"""Questions or conversations, and images -> the keyword arguments of our GLM-4-9B and GLM-4V-9B.

An image is a square of `image_size` pixels, and takes `image_tokens` positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from vlm.chat import ChatFormat
from vlm.chatglm.configuration import ChatGLMConfig
from vlm.chatglm.tokenization import SPECIALS, read_tokenizer
from vlm.checkpoint import read_json
from vlm.image_pixels import ImageInput, pixel_values
from vlm.processing import PreparedImage, Processor, config_from, refuse_other_tokenizer
from vlm.tiktoken_bpe import TiktokenTokenizer

CHAT = ChatFormat(
    opening="[gMASK]<sop>",
    turns={role: f"<|{role}|>\n{{}}" for role in ("system", "user", "assistant")},
    answer="<|assistant|>",
    markers=re.compile("|".join(map(re.escape, SPECIALS))),
)
"""A model answers with a line break first, which `ChatGLMProcessor.decode` takes off."""


class ChatGLMProcessor(Processor):
    """The tokenizer of one model, and what its config says of images."""

    chat = CHAT

    def __init__(self, tokenizer: TiktokenTokenizer, config: ChatGLMConfig) -> None:
        """Raises: SourceError when the tokenizer begins images with another id than the config."""
        if config.vision_config is not None and tokenizer.id_of("<|begin_of_image|>") != config.boi_token_id:
            raise SourceError(
                f"boi_token_id is {config.boi_token_id}, but <|begin_of_image|> is "
                f"{tokenizer.id_of('<|begin_of_image|>')} in the tokenizer: take both files from the same repository"
            )
        image_ids = frozenset([config.boi_token_id] if config.vision_config is not None else [])
        super().__init__(tokenizer, image_ids=image_ids)
        self.config = config

    @classmethod
    def from_folder(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> ChatGLMProcessor:
        """The processor of a model folder, from its config.json and tokenizer.model.

        Raises: SourceError when either is missing, unreadable or contradicts the other.
        """
        file = Path(path) / "config.json"
        made = config_from(ChatGLMConfig, config or read_json(file), file)
        tokenizer = read_tokenizer(path)
        refuse_other_tokenizer(tokenizer.vocab_size, made.vocab_size, "padded_vocab_size", path)
        return cls(tokenizer, made)

    def decode(self, ids: object) -> str:  # type: ignore[override]
        """Text of an answer's ids, up to the end of the turn, without the line break in front of it."""
        return super().decode(ids).removeprefix("\n")  # type: ignore[arg-type]

    def _prepared(self, image: ImageInput, num_images: int) -> PreparedImage:
        vision = self.config.vision_config
        assert vision is not None  # or _refuse_wrong_counts has refused
        pixels = pixel_values(image, img_size=vision.image_size)
        return PreparedImage(pixels=pixels, ids=[self.config.boi_token_id] * self.config.image_tokens)
