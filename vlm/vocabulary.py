"""How many tokens a model's head tells apart, as its config says under any spelling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPELLINGS = ("vocab_size", "padded_vocab_size")


def vocab_size_of(config: Mapping[str, Any]) -> int:
    """Rows of the head; 0 where the config names none."""
    levels = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    sizes = (level.get(name) for level in levels for name in SPELLINGS)
    return max((size for size in sizes if isinstance(size, int)), default=0)
