"""What the model will be asked to do: the one set of numbers behind every estimate in a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["auto", "float16", "bfloat16", "float32"]
Attention = Literal["sdpa", "eager"]

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests as they will come.

    `prompt_tokens` counts text only; image positions come on top. `image_size` is (width, height) in pixels, None
    for the model's native size. `max_model_len` is the KV cache's length in positions, None for exactly what the
    request needs: prompt + image positions + new tokens. `kv_dtype` "auto" follows `dtype`.

    Raises: ValueError for a count out of range or an unknown dtype or attention.
    """

    batch_size: int = 1
    num_images: int = 1
    image_size: tuple[int, int] | None = None
    prompt_tokens: int = 512
    new_tokens: int = 512
    max_model_len: int | None = None
    dtype: Dtype = "auto"
    kv_dtype: Dtype = "auto"
    attention: Attention = "sdpa"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_images", 0), ("prompt_tokens", 1), ("new_tokens", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size is {self.image_size}: width and height are at least 1 pixel")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len is {self.max_model_len}: it must be at least 1")
        for name, known in (
            ("dtype", get_args(Dtype)),
            ("kv_dtype", get_args(Dtype)),
            ("attention", get_args(Attention)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: known are {', '.join(known)}")


def workload_class(workload: Workload) -> str:
    """The kind of run that a proof covers: what meets what depends on this, and not on sizes."""
    images = "with images" if workload.num_images else "text only"
    padding = "padded batch" if workload.batch_size > 1 else "one sequence"
    return f"{images}, {padding}, {workload.attention} attention, dynamic cache, one beam"
