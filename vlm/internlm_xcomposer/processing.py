"""Questions or conversations, and images -> the keyword arguments of our first InternLM-XComposer.

An image is a square, and takes as many positions as there are queries, and a beginning and an end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from vlm.chat import ChatFormat
from vlm.checkpoint import read_json
from vlm.image_pixels import ImageInput, pixel_values
from vlm.internlm.processing import MARKERS
from vlm.internlm.tokenization import END_OF_ANSWER, END_OF_HUMAN, InternLMTokenizer
from vlm.internlm_xcomposer.configuration import InternLMXComposerConfig
from vlm.processing import PreparedImage, Processor, config_from, refuse_other_tokenizer

# The piece whose positions images take when config.json does not name another: no text can contain it by accident.
IMAGE_PIECE = "<TOKENS_UNUSED_2>"

CHAT = ChatFormat(
    turns={
        "system": "{}\n",
        "user": f" <|User|>:{{}}\n{END_OF_HUMAN}",
        "assistant": f" <|Bot|>:{{}}{END_OF_ANSWER}",
    },
    answer=" <|Bot|>:",
    markers=MARKERS,
)
"""Source: InternLM-XComposer `37b8258~1`, huggingface/internlm-xcomposer-vl/modeling (`wrap_prompt`)."""


class XComposerProcessor(Processor):
    """The tokenizer of one model, and what its config says of images."""

    chat = CHAT

    def __init__(self, tokenizer: InternLMTokenizer, config: InternLMXComposerConfig) -> None:
        super().__init__(tokenizer, image_ids=frozenset([config.image_token_id]))
        self.config = config

    @classmethod
    def from_folder(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> XComposerProcessor:
        """The processor of a model folder, from its config.json and tokenizer.model.

        Raises: SourceError when either is missing, unreadable or contradicts the other.
        """
        file = Path(path) / "config.json"
        tokenizer = InternLMTokenizer.from_folder(path)
        values = {"image_token_id": tokenizer.id_of(IMAGE_PIECE), **(config or read_json(file))}
        if values["image_token_id"] is None:
            raise SourceError(f"{file} names no image_token_id, and the tokenizer has no piece {IMAGE_PIECE}: name one")
        made = config_from(InternLMXComposerConfig, values, file)
        refuse_other_tokenizer(tokenizer.vocab_size, made.vocab_size, "vocab_size", path)
        return cls(tokenizer, made)

    def _prepared(self, image: ImageInput, num_images: int) -> PreparedImage:
        pixels = pixel_values(image, img_size=self.config.vision_config.image_size)
        return PreparedImage(pixels=pixels, ids=[self.config.image_token_id] * self.config.image_tokens)
