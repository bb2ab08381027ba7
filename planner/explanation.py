"""Where a model's bytes are: by part, within a decoder layer, in other precisions, and per position of the cache.

Pure functions on a module graph and a few numbers of a config, which somebody else has read. What the config does not
say, or says against the graph, is left out. Nothing here knows a device: planner/phase_bounds.py does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from planner.graph import ModuleGraph, ModuleGroup
from planner.phase_bounds import DeviceBounds, quantised_bytes
from planner.polynomial import Quantities
from planner.workload import ITEMSIZE

FORMAT = "plan-devices-explanation/1"

PartName = Literal["vision encoder", "projector", "embedding", "decoder layers", "norms", "head"]
PARTS: tuple[PartName, ...] = get_args(PartName)

PROJECTOR_NAMES = frozenset(
    {
        *("projector", "multi_modal_projector", "connector", "aligner", "merger", "deepstack_merger_list"),
        *("vision_proj", "internlm_proj", "linear_proj"),
    }
)
"""How transformers and the InternLM and GLM families name what leads from the vision encoder to the language model."""

FFN_MATRICES = (3, 2)
"""A gated feed-forward has three matrices (gate, up, down), a plain one two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """All groups that do one kind of work. `modules` are named where they are one group of several modules.

    A group is what has to share a device, so an embedding may hold parts of a projector that meet it there.
    """

    name: PartName
    num_groups: int
    num_parameters: int
    weight_bytes: int
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFacts:
    """What a config says about one decoder layer; None for what it leaves out.

    `ffn_width` is that of one feed-forward, of which a mixture has `num_experts`; `num_active_experts` run per token.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    ffn_width: int | None = None
    num_experts: int = 1
    num_active_experts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """The feed-forward of a layer. `step_bytes` is what every 1,024 of its width take over all layers."""

    width: int
    num_experts: int
    num_active_experts: int
    num_parameters: int
    step_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSplit:
    """One decoder layer, of the kind that most are: parameters by use, and its heads.

    `num_alike` layers of `num_layers` are of this size. Other parameters are norms, biases, routers and LoRAs.
    `full_kv_bytes_per_position` is what the model's cache would take with one key-value head per attention head.
    """

    num_layers: int
    num_alike: int
    num_parameters: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_parameters: int
    full_kv_bytes_per_position: int
    feed_forward: FeedForward | None

    @property
    def other_parameters(self) -> int:
        """Parameters that are in neither attention nor feed-forward matrices."""
        return self.num_parameters - self.attention_parameters - _parameters(self.feed_forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes of all weights, were the parts in `quantised` held in `name` and the rest in 16 bits."""

    name: str
    quantised: tuple[PartName, ...]
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Positions that one picture takes in the prompt; None where only a trace or the model's processor can tell.

    Width and height are in pixels, None for the model's own size.
    """

    size_px: tuple[int, int] | None
    num_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All that `plan-devices explain` has to say. `bounds` has one entry per kind of device that was asked about.

    `layouts` are those of weights in fewer bits, beside `dtype`.
    """

    model: str
    architecture: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    parts: tuple[Part, ...]
    layer: LayerSplit | None
    precisions: tuple[Precision, ...]
    kv_bytes_per_position: int
    fixed_image_px: tuple[int, int] | None
    pictures: tuple[Picture, ...]
    quantities: Quantities
    new_tokens: int
    extrapolated: tuple[str, ...]
    bounds: tuple[DeviceBounds, ...]
    layouts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"format": FORMAT, **asdict(self)}


def parts_of(graph: ModuleGraph) -> tuple[Part, ...]:
    """The graph's groups by what they do, in the order of `PARTS`; parts that are not there are left out."""
    lists = graph.cached_lists
    members: dict[PartName, list[ModuleGroup]] = {name: [] for name in PARTS}
    for group in graph:
        members[_part_name(group, lists)].append(group)
    return tuple(_part(name, groups) for name, groups in members.items() if groups)


def _part(name: PartName, groups: Sequence[ModuleGroup]) -> Part:
    return Part(
        name=name,
        num_groups=len(groups),
        num_parameters=sum(group.num_parameters for group in groups),
        weight_bytes=sum(group.weight_bytes for group in groups),
        modules=groups[0].modules if len(groups) == 1 and len(groups[0].modules) > 1 else (),
    )


def _part_name(group: ModuleGroup, lists: frozenset[str]) -> PartName:
    """A traced graph calls every element of a list a decoder layer, and every leaf a norm; what a decode step reads
    tells the language model's from the vision encoder's.
    """
    if group.role in ("embedding", "head"):
        return "embedding" if group.role == "embedding" else "head"
    if group.module_list in lists:
        return "decoder layers"
    if group.role == "projector" or all(PROJECTOR_NAMES & set(name.split(".")) for name in group.modules):
        return "projector"
    if group.role == "norm" and (not group.num_parameters or _is_read_in_decode(group)):
        return "norms"
    return "vision encoder"


def _is_read_in_decode(group: ModuleGroup) -> bool:
    one = Quantities(batch=1, images=0, patches=0, text_tokens=1, image_tokens=0, positions=1)
    return group.decode is not None and group.decode.moved_bytes(one) >= group.weight_bytes


def layer_split(graph: ModuleGraph, facts: DecoderFacts) -> LayerSplit | None:
    """What one decoder layer is made of; None where the config's numbers are not those of the graph."""
    lists = graph.cached_lists
    layers = [group for group in graph if group.module_list in lists]
    if len(layers) != facts.num_layers:
        return None
    num_parameters, num_alike = Counter(group.num_parameters for group in layers).most_common(1)[0]
    num_kv_heads = _kv_heads(max(group.kv_bytes_per_position for group in layers), graph, facts)
    if num_kv_heads is None:
        return None
    attention = 2 * facts.hidden_size * facts.head_dim * (facts.num_heads + num_kv_heads)
    if attention > num_parameters:
        return None
    return LayerSplit(
        num_layers=len(layers),
        num_alike=num_alike,
        num_parameters=num_parameters,
        hidden_size=facts.hidden_size,
        num_heads=facts.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=facts.head_dim,
        attention_parameters=attention,
        full_kv_bytes_per_position=graph.kv_bytes_per_position * facts.num_heads // num_kv_heads,
        feed_forward=_feed_forward(facts, num_parameters - attention, num_alike * ITEMSIZE[graph.dtype]),
    )


def _kv_heads(layer_bytes: int, graph: ModuleGraph, facts: DecoderFacts) -> int | None:
    """Key-value heads that a layer's cache amounts to; None where they are no divisor, or not what the config says."""
    found, rest = divmod(layer_bytes, 2 * facts.head_dim * ITEMSIZE[graph.dtype])
    if rest or not found or facts.num_heads % found or facts.num_kv_heads not in (None, found):
        return None
    return found


def _feed_forward(facts: DecoderFacts, room: int, bytes_per_parameter: int) -> FeedForward | None:
    """The feed-forward of a layer that has `room` parameters beside attention: gated where that is as much as it takes.

    `bytes_per_parameter` counts a parameter once for every layer.
    """
    if facts.ffn_width is None:
        return None
    per_width = facts.hidden_size * facts.num_experts
    matrices = next((count for count in FFN_MATRICES if count * per_width * facts.ffn_width <= room), None)
    if matrices is None:
        return None
    return FeedForward(
        width=facts.ffn_width,
        num_experts=facts.num_experts,
        num_active_experts=facts.num_active_experts,
        num_parameters=matrices * per_width * facts.ffn_width,
        step_bytes=matrices * per_width * 1024 * bytes_per_parameter,
    )


def _parameters(feed_forward: FeedForward | None) -> int:
    return feed_forward.num_parameters if feed_forward else 0


LANGUAGE: tuple[PartName, ...] = ("decoder layers",)
VISION: tuple[PartName, ...] = ("vision encoder", "projector")


def precisions_of(parts: Sequence[Part]) -> tuple[Precision, ...]:
    """Totals in 32 and 16 bits, and with the decoder layers in 8 and 4; with the vision encoder in 4 too, if any.

    Embedding and head stay in 16 bits, as GPTQ, AWQ and bitsandbytes leave them. Norms and biases of a quantised part
    are counted as its matrices are.
    """
    total = sum(part.num_parameters for part in parts)
    plain = (("float32", 4), ("float16", 2))
    found = [Precision(name=name, quantised=(), weight_bytes=size * total) for name, size in plain]
    rows: list[tuple[int, tuple[PartName, ...]]] = [(8, LANGUAGE), (4, LANGUAGE)]
    if any(part.name in VISION for part in parts):
        rows.append((4, LANGUAGE + VISION))
    for bits, names in rows:
        quantised = sum(part.num_parameters for part in parts if part.name in names)
        weight_bytes = quantised_bytes(quantised, bits) + 2 * (total - quantised)
        found.append(Precision(name=f"int{bits}", quantised=names, weight_bytes=weight_bytes))
    return tuple(found)
