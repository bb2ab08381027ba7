"""Questions or conversations -> the keyword arguments of our first InternLM, 7B and 20B."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.chat import ChatFormat
from vlm.checkpoint import read_json
from vlm.internlm.configuration import InternLMConfig
from vlm.internlm.tokenization import END_OF_ANSWER, InternLMTokenizer
from vlm.processing import Processor, config_from, refuse_other_tokenizer

MARKERS = re.compile(r"<TOKENS_UNUSED_\d+>|<eo[ah]>|</?s>|<\|(?:System|User|Bot)\|>")

CHAT = ChatFormat(
    turns={"system": "<|System|>:{}\n", "user": "<|User|>:{}\n", "assistant": f"<|Bot|>:{{}}{END_OF_ANSWER}\n"},
    answer="<|Bot|>:",
    markers=MARKERS,
)
"""Source: InternLM/lagent:lagent/llms/meta_template.py, INTERNLM_META."""


class InternLMProcessor(Processor):
    """The tokenizer of one text model."""

    chat = CHAT

    def __init__(self, tokenizer: InternLMTokenizer) -> None:
        super().__init__(tokenizer, image_ids=frozenset())

    @classmethod
    def from_folder(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> InternLMProcessor:
        """The processor of a model folder, from its config.json and tokenizer.model.

        Raises: SourceError when either is missing, unreadable or contradicts the other.
        """
        file = Path(path) / "config.json"
        made = config_from(InternLMConfig, config or read_json(file), file)
        tokenizer = InternLMTokenizer.from_folder(path)
        refuse_other_tokenizer(tokenizer.vocab_size, made.vocab_size, "vocab_size", path)
        return cls(tokenizer)
