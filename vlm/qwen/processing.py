"""Questions or conversations, and images -> the keyword arguments of our Qwen and Qwen-VL.

An image is a square of `image_size` pixels. It is written as officially, numbered, on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from planner.errors import SourceError
from vlm.chat import IMAGE_PLACEHOLDER, ROLES, ChatFormat
from vlm.checkpoint import read_json
from vlm.image_pixels import ImageInput, pixel_values
from vlm.processing import Conversation, PreparedImage, Processor, config_from, refuse_other_tokenizer
from vlm.qwen.configuration import QWenConfig
from vlm.qwen.tokenization import IMAGE_SPECIALS, TEXT_SPECIALS, read_tokenizer
from vlm.tiktoken_bpe import TiktokenTokenizer

# <ref>, <box> and their like are how Qwen-VL is told of regions; only what delimits an image is kept out of messages.
_IMAGE_MARKERS = [name for name in IMAGE_SPECIALS if "img" in name]

CHAT = ChatFormat(
    turns={role: f"<|im_start|>{role}\n{{}}<|im_end|>\n" for role in ROLES},
    answer="<|im_start|>assistant\n",
    markers=re.compile("|".join(map(re.escape, [*TEXT_SPECIALS, *_IMAGE_MARKERS]))),
    default_system="You are a helpful assistant.",
)
"""With the system turn that the official code adds where none is given."""


class QWenProcessor(Processor):
    """The tokenizer of one model, and what its config says of images."""

    chat = CHAT

    def __init__(self, tokenizer: TiktokenTokenizer, config: QWenConfig) -> None:
        """Raises: SourceError when the tokenizer begins images with another id than the config."""
        if config.visual is not None and tokenizer.id_of("<img>") != config.visual.image_start_id:
            raise SourceError(
                f"image_start_id is {config.visual.image_start_id}, but <img> is {tokenizer.id_of('<img>')} in the "
                "tokenizer: take both files from the same repository"
            )
        image_ids = frozenset([config.image_token_id] if config.image_token_id is not None else [])
        super().__init__(tokenizer, image_ids=image_ids)
        self.config = config

    @classmethod
    def from_folder(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> QWenProcessor:
        """The processor of a model folder, from its config.json and qwen.tiktoken.

        Raises: SourceError when either is missing, unreadable or contradicts the other.
        """
        file = Path(path) / "config.json"
        made = config_from(QWenConfig, config or read_json(file), file)
        tokenizer = read_tokenizer(path, images=made.visual is not None)
        refuse_other_tokenizer(tokenizer.vocab_size, made.vocab_size, "vocab_size", path)
        return cls(tokenizer, made)

    def _text(self, prompt: Conversation, num_images: int, chat: bool) -> str:
        numbers = count(1)
        text = super()._text(prompt, num_images, chat)
        return re.sub(IMAGE_PLACEHOLDER, lambda _: f"Picture {next(numbers)}: {IMAGE_PLACEHOLDER}\n", text)

    def _prepared(self, image: ImageInput, num_images: int) -> PreparedImage:
        visual = self.config.visual
        assert visual is not None  # or _refuse_wrong_counts has refused
        start = visual.image_start_id
        ids = [start, *[start + 2] * visual.n_queries, start + 1]
        return PreparedImage(pixels=pixel_values(image, img_size=visual.image_size), ids=ids)
