"""The tokenizer of a Qwen or Qwen-VL folder: `qwen.tiktoken` and the special tokens after it."""

from __future__ import annotations

from pathlib import Path

from vlm.tiktoken_bpe import TiktokenTokenizer, read_ranks

TOKENIZER_FILE = "qwen.tiktoken"

TEXT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""In the order of their ids, the first of which is 151643."""

IMAGE_SPECIALS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
"""What Qwen-VL adds: an image begins with 151857."""


def read_tokenizer(folder: str | Path, *, images: bool) -> TiktokenTokenizer:
    """The tokenizer of a model folder, with the special tokens of images or without.

    Raises: SourceError when its file is missing, damaged or of another kind.
    """
    path = Path(folder) / TOKENIZER_FILE
    return TiktokenTokenizer(
        read_ranks(path),
        most_digits=1,
        specials=TEXT_SPECIALS + (IMAGE_SPECIALS if images else ()),
        stops=("<|endoftext|>", "<|im_end|>"),
        pad="<|endoftext|>",
        where=str(path),
    )
