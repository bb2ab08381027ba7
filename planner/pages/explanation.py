"""An explanation as a person reads it in a terminal: rich renderables. Never prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.defaults import rests_on
from planner.explanation import Explanation, LayerSplit, Part, Precision
from planner.phase_bounds import GROUP_SIZE, Bound, DeviceBounds, PhaseBound, QuantisedDecode
from planner.report import seconds_text
from planner.units import GIB, format_bytes

MAX_MODULES = 6
POSITIONS = 1000
_BOUND_TEXTS: dict[Bound, str] = {
    "compute": "arithmetic",
    "bandwidth": "memory bandwidth",
    "launches": "kernel launches",
}
MEASURED_INT4 = (
    "Measured by its makers on one card: GLM-4V-9B makes 33.4 tokens/s in bfloat16, 28.7 in bitsandbytes int4."
)
"""Source: zai-org/GLM-4, basic_demo/README_en.md at 8047338; 1000 tokens."""


def explanation_report(found: Explanation) -> RenderableType:
    """Everything an explanation has to say: bytes by part, a decoder layer, precisions, cache and pictures, bounds."""
    parts: list[RenderableType] = [_headline(found), Text(), _part_table(found), Text()]
    parts += [*_cache_lines(found), *_layer_lines(found), *_picture_lines(found), Text(), *_precisions(found)]
    for bounds in found.bounds:
        parts += [Text(), *_bounds(found, bounds)]
    if any(bounds.int4_decode for bounds in found.bounds):
        parts += [Text(), Text(MEASURED_INT4, style="dim")]
    if defaults := rests_on(dict.fromkeys(one for bounds in found.bounds for one in bounds.defaults)):
        parts += [Text(), Text(defaults, style="dim")]
    if found.bounds and found.extrapolated:
        parts += [Text(f"Extrapolated beyond what was traced: {', '.join(found.extrapolated)}.", style="yellow")]
    if not found.bounds:
        parts += [Text("What bounds it on a GPU: --gpus rtx4090, or another model of GPU.", style="dim")]
    return Group(*parts)


def _headline(found: Explanation) -> Text:
    return Text.assemble(
        (found.model, "bold"),
        f": {found.num_parameters / 1e9:.2f} B parameters, {' and '.join((found.dtype, *found.layouts))}, "
        f"{format_bytes(found.weight_bytes)} of weights ({found.architecture})",
    )


def _table(*titles: str) -> Table:
    """A first column of names and right-aligned figures."""
    table = Table(box=None, pad_edge=False)
    table.add_column(titles[0], no_wrap=True, min_width=19)
    for title in titles[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _part_table(found: Explanation) -> Table:
    table = _table("Where the bytes are", "parameters", "GiB", "share")
    table.add_column(style="dim")
    for part in found.parts:
        count = f"{part.num_groups} " if part.name == "decoder layers" else ""
        table.add_row(count + part.name, *_amounts(found, part.num_parameters, part.weight_bytes), _modules(part))
        if part.name == "decoder layers" and found.layer and found.layer.num_alike == found.layer.num_layers:
            for name, count_of_one in _layer_parts(found.layer):
                num_parameters = count_of_one * found.layer.num_layers
                weight_bytes = part.weight_bytes * count_of_one // found.layer.num_parameters
                table.add_row(f"  {name}", *_amounts(found, num_parameters, weight_bytes), style="dim")
    return table


def _amounts(found: Explanation, num_parameters: int, weight_bytes: int) -> tuple[str, str, str]:
    return f"{num_parameters:,}", f"{weight_bytes / GIB:.2f}", f"{num_parameters / found.num_parameters:.1%}"


def _modules(part: Part) -> str:
    """What else is in an embedding's group because it must be on the same device."""
    shown = part.modules[:MAX_MODULES]
    return ", ".join(shown) + (" ..." if len(part.modules) > len(shown) else "")


def _layer_parts(layer: LayerSplit) -> Iterator[tuple[str, int]]:
    yield "attention", layer.attention_parameters
    if layer.feed_forward:
        yield "feed-forward", layer.feed_forward.num_parameters
    yield "norms, biases, LoRA" if layer.feed_forward else "the rest", layer.other_parameters


def _cache_lines(found: Explanation) -> Iterator[Text]:
    per_position = found.kv_bytes_per_position
    yield Text(
        f"KV cache: {format_bytes(per_position)} per position, {format_bytes(POSITIONS * per_position)} per "
        f"{POSITIONS:,} positions in {found.dtype}."
    )
    layer = found.layer
    if layer is None:
        return
    if layer.num_kv_heads == layer.num_heads:
        yield Text(f"  Each of the {layer.num_heads} attention heads has keys and values of its own.")
        return
    saved = POSITIONS * (layer.full_kv_bytes_per_position - per_position)
    yield Text(
        f"  {layer.num_heads} attention heads share {layer.num_kv_heads} key-value heads: one each would take "
        f"{layer.num_heads / layer.num_kv_heads:g} times as much, {format_bytes(saved)} more per {POSITIONS:,}."
    )


def _layer_lines(found: Explanation) -> Iterator[Text]:
    layer = found.layer
    if layer is None or layer.feed_forward is None:
        yield Text("Attention and feed-forward are not told apart: the config does not give their sizes.", style="dim")
        return
    ffn = layer.feed_forward
    experts = f"{ffn.num_experts} experts, {ffn.num_active_experts} of them per token, each "
    width = f"{ffn.width:,} wide, {ffn.width / layer.hidden_size:.2f} times the model's {layer.hidden_size:,}"
    yield Text(
        f"Feed-forward: {experts if ffn.num_experts > 1 else ''}{width}. "
        f"Every 1,024 of that width are {format_bytes(ffn.step_bytes)} of weights."
    )


def _picture_lines(found: Explanation) -> Iterator[Text]:
    for picture in found.pictures:
        if picture.size_px is None:
            size = f" resized to {_size(found.fixed_image_px)}" if found.fixed_image_px else " of the model's own size"
        else:
            size = f" of {_size(picture.size_px)}"
        if picture.num_tokens is None:
            yield Text(f"A picture{size}: only its processor or a trace can tell how many positions.", style="dim")
        elif not picture.num_tokens:
            yield Text(f"A picture{size} takes no position in the prompt: it is attended to from beside it.")
        else:
            cache = format_bytes(picture.num_tokens * found.kv_bytes_per_position)
            yield Text(f"A picture{size} takes {picture.num_tokens:,} positions, {cache} of KV cache.")


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[0]}x{size_px[1]}"


def _precisions(found: Explanation) -> Iterator[RenderableType]:
    table = _table("All weights in", "GiB")
    for precision in found.precisions:
        table.add_row(_precision_name(precision), f"{precision.weight_bytes / GIB:.2f}")
    yield table
    assumed = f"a 16-bit scale and a zero point per {GROUP_SIZE} weights; all else stays in 16 bits."
    yield Text(f"int8 and int4: {assumed}", style="dim")


def _precision_name(precision: Precision) -> str:
    if not precision.quantised:
        return precision.name
    return f"{precision.name} {'decoder layers' if len(precision.quantised) == 1 else 'and vision'}"


def _bounds(found: Explanation, bounds: DeviceBounds) -> Iterator[RenderableType]:
    counts = found.quantities
    images = f"{counts.images} image{'s'[: counts.images != 1]}, " if counts.images else ""
    holds = "holds the weights" if bounds.fits_weights else "does not hold the weights: as if on several in turn"
    yield Text.assemble(
        ("On ", "bold"),
        (bounds.device, "bold"),
        f" (batch {counts.batch}, {images}{counts.text_tokens} prompt + {found.new_tokens} new; one {holds})",
    )
    yield _bounds_table(bounds)
    for name, phase in (("Prefill", bounds.prefill), ("Decode", bounds.decode)):
        yield Text(f"{name} is bound by {_BOUND_TEXTS[phase.bound]}.{_intensity(phase, bounds)}")
    if bounds.decode.flops_per_byte < 0.5 * counts.batch:
        yield Text("Reading counts every expert of a layer; a token uses a few, and may cost much less.", style="dim")
    if bounds.int4_decode is not None:
        yield from _int4(bounds.decode, bounds.int4_decode, counts.batch)


def _bounds_table(bounds: DeviceBounds) -> Table:
    """What each phase needs, and the seconds that this takes on its own and together."""
    table = _table("", "prefill", "decode step")
    phases = (bounds.prefill, bounds.decode)
    table.add_row("TFLOP", *(f"{phase.flops / 1e12:.3g}" for phase in phases))
    table.add_row("GiB read", *(f"{phase.read_bytes / GIB:.2f}" for phase in phases))
    table.add_row("FLOP per byte", *map(_ratio, phases))
    table.add_row("kernels", *(f"{phase.launches:,}" for phase in phases))
    table.add_row("arithmetic", *(seconds_text(phase.compute_s) for phase in phases))
    table.add_row("reading", *(seconds_text(phase.read_s) for phase in phases))
    table.add_row("launches", *(seconds_text(phase.launch_s) for phase in phases))
    table.add_row("estimated in all", *(seconds_text(phase.total_s) for phase in phases), style="bold")
    return table


def _ratio(phase: PhaseBound) -> str:
    """FLOP per byte: whole, with a decimal below 10, with two below one."""
    ratio = phase.flops_per_byte
    return f"{ratio:,.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}"


def _intensity(phase: PhaseBound, bounds: DeviceBounds) -> str:
    if phase.bound == "launches":
        return " Neither a faster GPU nor fewer bytes help much; CUDA graphs or a larger batch do."
    ridge = bounds.ridge_flops_per_byte
    side = "above" if phase.flops_per_byte >= ridge else "below"
    return f" Its {_ratio(phase)} FLOP per byte are {side} the {ridge:.0f} of this GPU."


def _int4(step: PhaseBound, quantised: QuantisedDecode, batch: int) -> Iterator[Text]:
    """What int4 does to a decode step, and why bitsandbytes gains little or loses.

    Source of its two ways: bitsandbytes, autograd/_functions.py, matmul_4bit (gemv_4bit for one token, else
    dequantize_4bit and a linear).
    """
    yield Text(
        f"int4 decoder layers: {_beside(quantised.fused_s, step)} at best, where kernels read 4 bits. Only reading "
        f"shrinks: {step.launch_s / quantised.fused_s:.0%} of what is left are launches."
    )
    lone = "" if batch > 1 else " A lone token has a kernel that reads 4 bits, with no fewer launches."
    yield Text(
        "bitsandbytes int4: for more than one token at once every weight is unpacked to 16 bits in memory before the "
        f"product, {_beside(quantised.unpacked_s, step)}.{lone}"
    )


def _beside(seconds: float, step: PhaseBound) -> str:
    """`21.0 ms a step, 1.67 times as fast`."""
    return f"{seconds_text(seconds)} a step, {step.total_s / seconds:.2f} times as fast"
