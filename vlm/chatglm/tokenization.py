"""The tokenizer of a GLM-4-9B or GLM-4V-9B folder: `tokenizer.model`, in tiktoken's format, and its specials."""

from __future__ import annotations

from pathlib import Path

from vlm.tiktoken_bpe import TiktokenTokenizer, read_ranks

TOKENIZER_FILE = "tokenizer.model"

SPECIALS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
"""In the order of their ids: with 151,329 tokens before them, an image begins with 151339 and ends with 151340."""


def read_tokenizer(folder: str | Path) -> TiktokenTokenizer:
    """The tokenizer of a model folder.

    Raises: SourceError when its file is missing, damaged or of another kind.
    """
    path = Path(folder) / TOKENIZER_FILE
    return TiktokenTokenizer(
        read_ranks(path),
        most_digits=3,
        specials=SPECIALS,
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
        pad="<|endoftext|>",
        where=str(path),
    )
