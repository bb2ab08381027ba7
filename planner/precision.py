"""What of a plan's weights is in fewer bits, what that saves, and what it costs in time: a value for plan files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from planner.units import format_bytes

MOST_NAMES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """Linear layers in fewer bits: `layouts` name how, `weight_bytes` are theirs, and would be `plain_bytes`.

    `stored` says that the checkpoint has them so; else they are quantised while they are loaded, but those in the
    modules of `kept`. The plain times are those of the same placement with all weights in the model's dtype, if it had
    the memory; None where a device's speed is unknown. The ratios are of what a token reads and launches to that of
    plain weights, whatever the device.
    """

    layouts: tuple[str, ...]
    stored: bool
    kept: tuple[str, ...]
    num_layers: int
    weight_bytes: int
    plain_bytes: int
    plain_ttft_s: float | None = None
    plain_tpot_s: float | None = None
    read_ratio: float | None = None
    launch_ratio: float | None = None

    def __post_init__(self) -> None:
        if not self.layouts:
            raise ValueError("quantization names no layouts: plans without any have no such part")

    @property
    def skip_modules(self) -> list[str]:
        """`kept` as transformers' BitsAndBytesConfig takes it for `llm_int8_skip_modules`: expressions from the start.

        As plain names they would also match the ends of others.
        """
        return [f"^{re.escape(module)}" for module in self.kept]

    def sentences(self, dtype: str, tpot_s: float | None) -> Iterator[str]:
        """For a report: what is in fewer bits, what is not, and the time of a token without it beside `tpot_s`."""
        when = "in the checkpoint" if self.stored else "while loading"
        yield (
            f"Quantised {when}: {self.num_layers} linear layers in {' and '.join(self.layouts)}, "
            f"{format_bytes(self.weight_bytes)} instead of {format_bytes(self.plain_bytes)}."
        )
        if self.kept:
            shown = ", ".join(self.kept[:MOST_NAMES]) + (", ..." if len(self.kept) > MOST_NAMES else "")
            yield f"In {dtype} stay the linear layers of {shown}."
        if self.plain_tpot_s and tpot_s:
            yield (
                f"In {dtype} the same placement, had it the memory, would take {self.plain_tpot_s * 1e3:.1f} ms a "
                f"token instead of {tpot_s * 1e3:.1f} ms."
            )
        elif self.read_ratio is not None and self.launch_ratio is not None:
            yield (
                f"A token reads {self.read_ratio:.2f} times the bytes that it would in {dtype}, in "
                f"{self.launch_ratio:.2f} times the kernels: which of them counts depends on the GPU."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a plan file."""
        return {**asdict(self), "layouts": list(self.layouts), "kept": list(self.kept)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Quantised:
        """The inverse of `to_dict`. Raises: TypeError, KeyError or ValueError for content of another form."""
        names = {key: tuple(map(str, content[key])) for key in ("layouts", "kept")}
        return cls(**{**content, **names})
