"""Models whose graph a trace found: of any architecture that has a class, for the workloads that were traced.

Torch-free: costs come from files, or from a tracer that the caller hands in. It does not know how to trace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from planner.beams import SCORE_BYTES, with_beams
from planner.errors import ConstraintError
from planner.graph import ModuleGraph
from planner.polynomial import Quantities
from planner.workload import ITEMSIZE, Workload
from vlm.checkpoint import Checkpoint
from vlm.config_counts import vocab_size_of
from vlm.families import FAMILIES
from vlm.held import held_graph
from vlm.image_rule import ImageRule

VOLATILE_KEYS = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "auto_map",
    "use_cache",
    "quantization_config",
)
"""Keys of a config that say nothing about the modules, and differ between files of one model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedCosts:
    """A traced graph, what an image is to it (None where no image was traced), and which model that was.

    `fingerprint` hashes the names and shapes of its parameters; `max_positions` is what its config says it was made
    for.
    """

    graph: ModuleGraph
    image: ImageRule | None
    fingerprint: str
    max_positions: int | None
    versions: str


Tracer = Callable[["TracedModel", Workload], TracedCosts]
"""Finds the costs of a model under a workload: in a file, or by running it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A model of any architecture. `find_costs` answers for each kind of workload that is asked about.

    `catalogue_stem` names the catalogue's file, where the model is from there; `code` is the folder of the model's own
    code where that may be run. What all costs of a model agree on is read off those that were found first.
    """

    name: str
    origin: Literal["folder", "catalogue", "hub"]
    architecture: str
    default_dtype: str
    config: Mapping[str, Any]
    find_costs: Tracer
    checkpoint: Checkpoint | None = None
    catalogue_stem: str | None = None
    code: Path | None = None
    _found: list[tuple[str, TracedCosts]] = field(default_factory=list, compare=False, repr=False)

    @property
    def has_images(self) -> bool:
        """Whether the architecture takes images, or the config speaks of them, of patches or a vision part anywhere."""
        family = FAMILIES.get(self.architecture)
        return family is not None and family.sees or _speaks_of_images(self.config)

    @property
    def fixed_image_px(self) -> tuple[int, int] | None:
        """Width and height that every picture is resized to; None where any size will do."""
        rules = [costs.image for _, costs in self._found if costs.image] or [self._costs(self._default).image]
        return rules[0].native_px if rules[0] and not rules[0].any_size else None

    @property
    def max_positions(self) -> int | None:
        """The context that the model was made for."""
        return self._any_costs.max_positions

    @property
    def fingerprint(self) -> str:
        """Equal for any two sources of the same architecture at the same size."""
        return self._any_costs.fingerprint

    def smaller_images(self, workload: Workload) -> Iterator[tuple[int, int]]:
        """Smaller sizes than a resolved workload's whose costs are known as well, the largest first."""
        rule = self._costs(workload).image if workload.num_images else None
        return rule.smaller(workload.image_size, workload.num_images) if rule else iter(())

    @property
    def config_digest(self) -> str:
        """A hash of what the config says about the modules, and of the model's own code where that makes them."""
        content = {key: value for key, value in self.config.items() if key not in VOLATILE_KEYS}
        said = json.dumps(content, sort_keys=True, default=str).encode()
        sources = sorted(self.code.glob("*.py")) if self.code else []
        return hashlib.sha256(b"".join([said, *(path.read_bytes() for path in sources)])).hexdigest()[:16]

    def resolved(self, workload: Workload) -> Workload:
        """`workload` with every "auto" and default decided for this model.

        Raises: ConstraintError when `max_model_len` is shorter than the request, or `kv_dtype` is not `dtype`.
        """
        typed = self._typed(workload)
        image_tokens = self._image_counts(typed)[1]
        needed = typed.prompt_tokens + image_tokens + typed.new_tokens
        length = needed if typed.max_model_len is None else typed.max_model_len
        if length < needed:
            raise ConstraintError(
                f"max_model_len {length} is shorter than the request: {typed.prompt_tokens} prompt + {image_tokens} "
                f"image + {typed.new_tokens} new = {needed} positions. Raise --max-model-len to {needed} or ask for "
                "less."
            )
        return replace(typed, max_model_len=length)

    def quantities(self, workload: Workload) -> Quantities:
        """The counts of a resolved workload."""
        patches, image_tokens = self._image_counts(workload)
        return Quantities(
            batch=workload.num_sequences,
            images=workload.num_images,
            patches=patches,
            text_tokens=workload.prompt_tokens,
            image_tokens=image_tokens,
            positions=workload.max_model_len or 0,
        )

    def graph(self, workload: Workload) -> ModuleGraph:
        """The module graph of a resolved workload's kind, in its dtype, with what is quantised so."""
        graph = replace(self._costs(workload).graph, name=self.name, dtype=workload.dtype)
        if workload.num_beams > 1:
            graph = with_beams(graph, vocab_size_of(self.config) * SCORE_BYTES)
        return held_graph(graph, workload, self.config, self.checkpoint)

    @property
    def _any_costs(self) -> TracedCosts:
        return self._found[0][1] if self._found else self._costs(self._default)

    @property
    def _default(self) -> Workload:
        return self._typed(Workload(num_images=1 if self.has_images else 0))

    def _typed(self, workload: Workload) -> Workload:
        dtype = self.default_dtype if workload.dtype == "auto" else workload.dtype
        kv_dtype = dtype if workload.kv_dtype == "auto" else workload.kv_dtype
        if kv_dtype != dtype:
            raise ConstraintError(
                f"kv_dtype {kv_dtype} with dtype {dtype}: the cache keeps keys and values in the model's dtype. "
                "Leave kv_dtype at auto; transformers' QuantizedCache, of 2 or 4 bits, is not planned."
            )
        images = workload.num_images if self.has_images else 0
        return replace(workload, dtype=dtype, kv_dtype=kv_dtype, num_images=images)

    def _image_counts(self, workload: Workload) -> tuple[int, int]:
        """Patches and positions of all images of a sample."""
        if not workload.num_images:
            return 0, 0
        rule = self._costs(workload).image
        assert rule is not None, "costs with images have a rule for them"
        counts = rule.counts(workload.image_size, workload.num_images)
        assert counts is not None, "costs are found for the size that is asked for"
        return workload.num_images * counts[0], workload.num_images * counts[1]

    def _costs(self, workload: Workload) -> TracedCosts:
        asked = workload.expanded
        kind = costs_kind(asked)
        costs = next((one for known, one in self._found if known == kind and _reaches(one.graph, asked)), None)
        if costs is None:
            costs = self.find_costs(self, asked)
            if not any(one is costs for _, one in self._found):
                self._found.append((kind, costs))
        return costs


MAX_TRACED_TOKENS = 16384
"""Longest prompt that is traced: masks are real there, and one of this length squared is 256 MiB."""
MIN_TRACED_TOKENS = 4096


def traced_tokens(workload: Workload) -> int:
    """Length of the longest prompt to trace for a workload: a power of two that covers its positions, within limits."""
    needed = workload.max_model_len or workload.prompt_tokens + workload.new_tokens
    longest = max(workload.prompt_tokens, needed, MIN_TRACED_TOKENS)
    return min(MAX_TRACED_TOKENS, 1 << (longest - 1).bit_length())


def costs_key(workload: Workload) -> str:
    """What costs are found for: workloads of one key differ in nothing but the lengths of text and answer."""
    return f"{costs_kind(workload)}, to {traced_tokens(workload)} tokens"


def costs_kind(workload: Workload) -> str:
    """What makes runs take different ways, lengths aside."""
    size = "x".join(map(str, workload.image_size)) if workload.image_size and workload.num_images else "native"
    images = f"{workload.num_images} images {size}" if workload.num_images else "text only"
    code = f"{workload.attention}, {ITEMSIZE[workload.dtype]} bytes"
    return f"batch {workload.batch_size}, {images}, {code}{', ties apart' if workload.replicate_tied else ''}"


def _reaches(graph: ModuleGraph, workload: Workload) -> bool:
    """Whether costs were traced for texts and a cache of a workload's lengths."""
    lengths = {"text_tokens": workload.prompt_tokens, "positions": workload.max_model_len or 0}
    return all(lengths[one.variable] <= one.high for one in graph.valid if one.variable in lengths)


def _speaks_of_images(config: Mapping[str, Any]) -> bool:
    levels = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    keys = [str(key) for level in levels for key in level]
    return any(mark in key for key in keys for mark in ("image", "vision", "visual", "patch", "vq_config"))
