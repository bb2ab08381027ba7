"""The names of a checkpoint's weights -> the model's parts, in the order in which such models run, with their roles.

A list of elements with several weights each is a list of blocks; the largest outside the vision path is the decoder.
What else there is goes by the words that model code uses for it. Nothing here is run: it is how models are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from planner.errors import UnsupportedModelError
from planner.graph import Role
from planner.paths import contains

Shape = tuple[int, ...]

_PROJECTOR = re.compile(
    r"(^|_)proj(ector|ection)?$|^mlp1$|merger|connector|resampler|aligner|abstractor|adapter|q_?former|perceiver"
)
_VISION = re.compile(r"vision|visual|(^|_)vit($|_)|image|img|clip|(^|_)eva($|_)|patch_embed")
_EMBEDDING = re.compile(r"embed_tokens|tok_embeddings|word_embeddings|(^|\.)wte$|embed_in$")
_HEAD = re.compile(r"(^|\.)(lm_head|output|output_layer|embed_out|score)$")
_NORM = re.compile(r"(^|\.)(norm|ln_f|final_layernorm|final_layer_norm|norm_f)$")
_PARAMETERS = ("weight", "bias")
MIN_BLOCK_TENSORS = 4
"""An attention and a feed-forward have at least as many weights; what has fewer is a chain of plain layers."""
ORDER: tuple[Role, ...] = ("vision_encoder", "projector", "embedding", "decoder_layer", "norm", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Modules placed as one, and their weights' shapes; `module_list` names the list of blocks that it is one of."""

    modules: tuple[str, ...]
    role: Role
    shapes: Mapping[str, Shape]
    module_list: str | None = None

    @property
    def num_parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))


def parts_of(shapes: Mapping[str, Shape]) -> tuple[Part, ...]:
    """The parts that weights of these names make up, in order of execution.

    Raises: UnsupportedModelError when there is no list of decoder blocks, or no token embedding.
    """
    lists, rest = _sorted_out(shapes)
    decoder = _decoder(lists)
    parts = [
        Part(modules=(f"{path}.{index}",), role=_role(path, decoder), shapes=held, module_list=path)
        for path, elements in lists.items()
        for index, held in sorted(elements.items())
    ]
    parts += [Part(modules=(path,), role=_role(path, decoder), shapes=held) for path, held in rest.items()]
    if not any(part.role == "embedding" for part in parts):
        raise UnsupportedModelError(
            "none of its weights has the name of a token embedding, such as model.embed_tokens: nothing shows how the "
            "model begins"
        )
    return tuple(sorted(parts, key=lambda part: (ORDER.index(part.role), part.module_list is not None)))


Lists = dict[str, dict[int, dict[str, Shape]]]
"""Path of a list -> index of an element -> its weights by name."""


def _sorted_out(shapes: Mapping[str, Shape]) -> tuple[Lists, dict[str, dict[str, Shape]]]:
    """The lists of blocks, and all other weights by their module."""
    numbered: Lists = {}
    rest: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        segments = name.split(".")
        at = next((i for i, segment in enumerate(segments) if i and segment.isdigit()), None)
        if at is None:
            rest.setdefault(_module(name), {})[name] = shape
        else:
            elements = numbered.setdefault(".".join(segments[:at]), {})
            elements.setdefault(int(segments[at]), {})[name] = shape
    lists = {
        path: elements
        for path, elements in numbered.items()
        if len(elements) > 1 and min(map(len, elements.values())) >= MIN_BLOCK_TENSORS
    }
    for path in numbered.keys() - lists.keys():
        rest.setdefault(path, {}).update(
            (name, shape) for held in numbered[path].values() for name, shape in held.items()
        )
    return lists, rest


def _decoder(lists: Lists) -> str:
    """The path of the largest list outside the vision path."""
    sizes = {
        path: sum(prod(shape) for held in elements.values() for shape in held.values())
        for path, elements in lists.items()
        if _vision_role(path) is None
    }
    if not sizes:
        raise UnsupportedModelError(
            "its weights' names show no list of decoder layers, such as model.layers.0 and so on: nothing shows where "
            "the model could be cut"
        )
    return max(sizes, key=lambda path: sizes[path])


def _role(path: str, decoder: str) -> Role:
    """The role of a module; what no word gives away stays with the vision path, beside the embedding."""
    if contains(decoder, path):
        return "decoder_layer"
    seen = _vision_role(path)
    if seen:
        return seen
    for pattern, role in ((_EMBEDDING, "embedding"), (_HEAD, "head"), (_NORM, "norm")):
        if pattern.search(path):
            return role  # type: ignore[return-value]
    return "projector"


def _vision_role(path: str) -> Role | None:
    for segment in path.split("."):
        if _PROJECTOR.search(segment):
            return "projector"
        if _VISION.search(segment):
            return "vision_encoder"
    return None


def _module(name: str) -> str:
    """The module that a weight belongs to; a bare parameter is an entry of its own."""
    path, _, last = name.rpartition(".")
    return path if path and last in _PARAMETERS else name
