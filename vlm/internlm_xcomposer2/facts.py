"""What the config of an InternLM2 or InternLM-XComposer2 model says about its size: every weight's name and shape.

Torch-free: planning reads only this. The modelling code is checked against it, name by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import SourceError
from planner.graph import Linear

Shape = tuple[int, ...]

CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "num_channels": 3,
}
"""openai/clip-vit-large-patch14-336, which the official constructor names instead of configuring."""

VISION = "vit.vision_tower.vision_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFacts:
    """The CLIP vision tower at one image size."""

    image_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    num_channels: int

    @property
    def image_tokens(self) -> int:
        """Positions one image takes in the language model: its patches, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def sequence_length(self) -> int:
        """Positions the tower sees: the patches and one class token."""
        return self.image_tokens + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InternLM2Facts:
    """Sizes of an InternLM2 language model; with `vision`, of an InternLM-XComposer2."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    plora_rank: int
    vision: VisionFacts | None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> InternLM2Facts:
        """The facts in an official config.json.

        Raises: SourceError naming the key, its value and the rule.
        """
        named = config.get("architectures")
        architecture = str(named[0]) if isinstance(named, list) and named else ""
        heads = _positive(config, "num_attention_heads", where)
        facts = cls(
            architecture=architecture,
            vocab_size=_positive(config, "vocab_size", where),
            hidden_size=_positive(config, "hidden_size", where),
            intermediate_size=_positive(config, "intermediate_size", where),
            num_hidden_layers=_positive(config, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=_positive({"num_key_value_heads": heads, **config}, "num_key_value_heads", where),
            max_position_embeddings=_positive(config, "max_position_embeddings", where),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            plora_rank=_positive({"plora_rank": 256, **config}, "plora_rank", where),
            vision=_vision_from(config, where) if "XComposer2" in architecture else None,
        )
        _refuse_contradictions(facts, config, where)
        return facts

    def tensor_shapes(self) -> dict[str, Shape]:
        """Every weight's official name and shape, in module order (out, in)."""
        shapes = {"model.tok_embeddings.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["output.weight"] = (self.vocab_size, self.hidden_size)
        if self.vision is not None:
            shapes |= _vision_shapes(self.vision)
            shapes |= _linear("vision_proj.0", self.vision.hidden_size, self.hidden_size, bias=True)
            shapes |= _linear("vision_proj.2", self.hidden_size, self.hidden_size, bias=True)
        return shapes

    def _layer_shapes(self) -> dict[str, Shape]:
        width, inner = self.hidden_size, self.intermediate_size
        packed = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        linears = {
            "attention.wqkv": (width, packed),
            "attention.wo": (width, width),
            "feed_forward.w1": (width, inner),
            "feed_forward.w3": (width, inner),
            "feed_forward.w2": (inner, width),
        }
        shapes: dict[str, Shape] = {}
        for name, (fan_in, fan_out) in linears.items():
            shapes[f"{name}.weight"] = (fan_out, fan_in)
            if self.vision is not None:
                shapes[f"{name}.Plora_A.weight"] = (self.plora_rank, fan_in)
                shapes[f"{name}.Plora_B.weight"] = (fan_out, self.plora_rank)
        return {**shapes, "attention_norm.weight": (width,), "ffn_norm.weight": (width,)}


def _vision_shapes(vision: VisionFacts) -> dict[str, Shape]:
    width, patch = vision.hidden_size, vision.patch_size
    shapes: dict[str, Shape] = {
        f"{VISION}.embeddings.class_embedding": (width,),
        f"{VISION}.embeddings.patch_embedding.weight": (width, vision.num_channels, patch, patch),
        f"{VISION}.embeddings.position_embedding.weight": (vision.sequence_length, width),
        **_layer_norm(f"{VISION}.pre_layrnorm", width),
    }
    for index in range(vision.num_hidden_layers):
        layer = f"{VISION}.encoder.layers.{index}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", width, width, bias=True)
        shapes |= _layer_norm(f"{layer}.layer_norm1", width)
        shapes |= _linear(f"{layer}.mlp.fc1", width, vision.intermediate_size, bias=True)
        shapes |= _linear(f"{layer}.mlp.fc2", vision.intermediate_size, width, bias=True)
        shapes |= _layer_norm(f"{layer}.layer_norm2", width)
    return shapes | _layer_norm(f"{VISION}.post_layernorm", width)


def linears_by_group(shapes: Mapping[str, Shape]) -> dict[str, list[Linear]]:
    """The matrices of linear layers by the module that is placed: an element of a list, or a top module.

    Left out are the embeddings, and the low-rank parts, which stay as they are when their layer is quantised.
    """
    found: dict[str, list[Linear]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and not module.endswith(("embedding", "tok_embeddings", "Plora_A", "Plora_B")):
            placed = re.match(r".*?\.layers\.\d+|\w+", module)
            assert placed is not None
            found.setdefault(placed[0], []).append(Linear(module, *shape))
    return found


def _linear(name: str, fan_in: int, fan_out: int, *, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (fan_out, fan_in), **({f"{name}.bias": (fan_out,)} if bias else {})}


def _layer_norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _vision_from(config: Mapping[str, Any], where: str) -> VisionFacts:
    given = config.get("vision_config") or {}
    if not isinstance(given, Mapping):
        raise SourceError(f"{where}: vision_config is {given!r}, not a mapping")
    values = {**CLIP_LARGE, **given}
    sizes = {name: _positive(values, name, f"{where}, vision_config") for name in CLIP_LARGE}
    vision = VisionFacts(image_size=_positive(config, "img_size", where), **sizes)
    if vision.image_size % vision.patch_size:
        raise SourceError(
            f"{where}: img_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}; "
            "the tower cuts the picture into whole patches"
        )
    return vision


def _positive(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = "missing" if value is None else repr(value)
        raise SourceError(f"{where}: {key} is {shown}; it must be a whole number of at least 1")
    return value


def _refuse_contradictions(facts: InternLM2Facts, config: Mapping[str, Any], where: str) -> None:
    problems = []
    if facts.hidden_size % facts.num_attention_heads:
        problems.append(
            f"hidden_size {facts.hidden_size} is not a multiple of num_attention_heads {facts.num_attention_heads}"
        )
    if facts.num_attention_heads % facts.num_key_value_heads:
        problems.append(
            f"num_attention_heads {facts.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{facts.num_key_value_heads}"
        )
    rope = config.get("rope_scaling")
    kind = rope.get("type", rope.get("rope_type")) if isinstance(rope, Mapping) else rope
    if kind not in (None, "dynamic", "default"):
        problems.append(f"rope_scaling type is {kind!r}; InternLM2 has 'dynamic' or none")
    if config.get("bias"):
        problems.append("bias is true; no InternLM2 model has biases in its language model")
    if problems:
        raise SourceError(f"{where}: {'; '.join(problems)}")
