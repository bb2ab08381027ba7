"""What the model will be asked to do: the one set of numbers behind every estimate in a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from planner.implementation import IMPLEMENTATIONS, OURS

Dtype = Literal["auto", "float16", "bfloat16", "float32"]
Attention = Literal["sdpa", "eager"]
Quantize = Literal["none", "auto", "int8", "nf4", "nf4-double", "fp4", "fp4-double"]
"""What weights are turned into while they are loaded; -double quantises the scales of 4-bit weights, too."""

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests as they will come.

    `prompt_tokens` counts text only; image positions come on top. `image_size` is (width, height) in pixels, None
    for the model's native size. `max_model_len` is the KV cache's length in positions, None for exactly what the
    request needs: prompt + image positions + new tokens. `num_beams` is beam search's: every request of the batch is
    that many sequences. `implementation` names the code that will run (planner.implementation). `kv_dtype` "auto"
    follows `dtype`. `quantize` is for the linear layers of the decoder, with `quantize_vision` for those of the vision
    path as well; "auto" is decided for a machine, and decides about the vision path itself. With `replicate_tied` a
    weight that several modules share may be kept once on each of their devices.

    Raises: ValueError for a count out of range, an unknown dtype, attention or layout, or a contradiction.
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
    num_beams: int = 1
    implementation: str = OURS
    quantize: Quantize = "none"
    quantize_vision: bool = False
    replicate_tied: bool = False

    def __post_init__(self) -> None:
        least_values = {"batch_size": 1, "num_images": 0, "prompt_tokens": 1, "new_tokens": 1, "num_beams": 1}
        for name, least in least_values.items():
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
            ("quantize", get_args(Quantize)),
            ("implementation", tuple(IMPLEMENTATIONS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: known are {', '.join(known)}")
        if self.quantize_vision and self.quantize in ("none", "auto"):
            raise ValueError(
                f"quantize_vision with quantize {self.quantize!r}: name what the vision path is to be held in, "
                "such as nf4"
            )

    @property
    def num_sequences(self) -> int:
        """Rows of a forward: every beam of every request is one, from the prompt on."""
        return self.batch_size * self.num_beams

    @property
    def expanded(self) -> Workload:
        """The workload without beam search whose forwards are as large."""
        return replace(self, batch_size=self.num_sequences, num_beams=1)


def workload_class(workload: Workload) -> str:
    """The kind of run that a proof covers: what meets what depends on this, and not on sizes."""
    images = "with images" if workload.num_images else "text only"
    padding = "padded batch" if workload.batch_size > 1 else "one sequence"
    beams = "several beams" if workload.num_beams > 1 else "one beam"
    ties = ", ties apart" if workload.replicate_tied else ""
    return f"{images}, {padding}, {workload.attention} attention, dynamic cache, {beams}{ties}"
