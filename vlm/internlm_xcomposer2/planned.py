"""InternLM2 and InternLM-XComposer2 as planning sees them: their graph is written down, so that no run is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from planner.beams import with_beams
from planner.errors import ConstraintError, SourceError
from planner.graph import ModuleGraph
from planner.polynomial import Quantities
from planner.workload import Workload
from vlm.checkpoint import Checkpoint
from vlm.held import held_graph
from vlm.internlm_xcomposer2.facts import VISION, InternLM2Facts
from vlm.internlm_xcomposer2.graph import FLOAT32, Precision, build_graph
from vlm.stored_layouts import quantization_config

ARCHITECTURES = ("InternLMXComposer2ForCausalLM", "InternLM2ForCausalLM")

OPTIONAL_WEIGHTS = (f"{VISION}.post_layernorm.weight", f"{VISION}.post_layernorm.bias")
"""Never used by the forward, and absent from some official checkpoints (lmdeploy materialises them by hand)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InternLM2Model:
    """A model of either family. `checkpoint` is None for a catalogue name."""

    name: str
    origin: Literal["folder", "catalogue", "hub"]
    facts: InternLM2Facts
    default_dtype: str
    config: Mapping[str, Any]
    checkpoint: Checkpoint | None = None

    @property
    def architecture(self) -> str:
        """The class that the config names."""
        return self.facts.architecture

    @property
    def code(self) -> None:
        """Its code is here: none of its own is run."""

    @property
    def has_images(self) -> bool:
        """Whether the model sees."""
        return self.facts.vision is not None

    @property
    def fixed_image_px(self) -> tuple[int, int] | None:
        """Width and height that every picture is resized to."""
        vision = self.facts.vision
        return (vision.image_size, vision.image_size) if vision else None

    @property
    def max_positions(self) -> int | None:
        """The context that the model was made for."""
        return self.facts.max_position_embeddings

    @property
    def fingerprint(self) -> str:
        """Equal for any two sources of the same architecture at the same size: a hash of weight names and shapes."""
        shapes = json.dumps([self.facts.architecture, *self.facts.tensor_shapes().items()])
        return hashlib.sha256(shapes.encode()).hexdigest()[:16]

    def resolved(self, workload: Workload) -> Workload:
        """`workload` with every "auto" and default decided for this model.

        Raises: ConstraintError when `max_model_len` is shorter than the request.
        """
        dtype = self.default_dtype if workload.dtype == "auto" else workload.dtype
        images = workload.num_images if self.facts.vision else 0
        needed = workload.prompt_tokens + images * self._image_tokens + workload.new_tokens
        length = needed if workload.max_model_len is None else workload.max_model_len
        if length < needed:
            raise ConstraintError(
                f"max_model_len {length} is shorter than the request: {workload.prompt_tokens} prompt + "
                f"{images * self._image_tokens} image + {workload.new_tokens} new = {needed} positions. "
                f"Raise --max-model-len to {needed} or ask for less."
            )
        kv_dtype = dtype if workload.kv_dtype == "auto" else workload.kv_dtype
        if kv_dtype != dtype:
            raise ConstraintError(
                f"kv_dtype {kv_dtype} with dtype {dtype}: the cache keeps keys and values in the model's dtype. "
                "Leave kv_dtype at auto; transformers' QuantizedCache, of 2 or 4 bits, is not planned."
            )
        return replace(workload, dtype=dtype, kv_dtype=kv_dtype, num_images=images, max_model_len=length)

    def quantities(self, workload: Workload) -> Quantities:
        """The counts of a resolved workload."""
        vision = self.facts.vision
        return Quantities(
            batch=workload.num_sequences,
            images=workload.num_images,
            patches=workload.num_images * vision.sequence_length if vision else 0,
            text_tokens=workload.prompt_tokens,
            image_tokens=workload.num_images * self._image_tokens,
            positions=workload.max_model_len or 0,
        )

    def graph(self, workload: Workload) -> ModuleGraph:
        """The module graph in the dtypes and attention of a resolved workload."""
        precision = Precision(
            dtype=workload.dtype,
            kv_dtype=workload.kv_dtype,
            padded=workload.batch_size > 1,
            eager=workload.attention == "eager",
        )
        graph = build_graph(self.name, self.facts, precision)
        # Two of the three tables of a beam's scores are those that `generate` makes of any sequence.
        if workload.num_beams > 1:
            graph = with_beams(graph, self.facts.vocab_size * FLOAT32)
        return held_graph(graph, workload, self.config, self.checkpoint)

    @property
    def _image_tokens(self) -> int:
        return self.facts.vision.image_tokens if self.facts.vision else 0


def catalogued(name: str, config: Mapping[str, Any], dtype: str) -> InternLM2Model:
    """The model of a catalogue entry."""
    facts = InternLM2Facts.from_config(config, f"catalogue entry {name}")
    return InternLM2Model(name=name, origin="catalogue", facts=facts, default_dtype=dtype, config=config)


def from_checkpoint(checkpoint: Checkpoint, architecture: str) -> InternLM2Model:
    """The model of a checkpoint folder.

    Raises: SourceError when the config is malformed, or the weights' headers are not those that it calls for.
    """
    config = {**checkpoint.config, "architectures": [architecture]}
    facts = InternLM2Facts.from_config(config, str(checkpoint.folder / "config.json"))
    if quantization_config(config) is None:  # else names and shapes are the method's, and compared with its codes
        _compare_headers(checkpoint, facts)
    stored = checkpoint.dtype
    return InternLM2Model(
        name=checkpoint.folder.resolve().name,
        origin="folder",
        facts=facts,
        default_dtype=stored if stored in ("float16", "bfloat16") else "float16",
        config=config,
        checkpoint=checkpoint,
    )


def architecture_of_layout(names: Iterable[str]) -> str | None:
    """Which of the two families weights of these names are, for a config that does not say; None for neither.

    Official configs say model_type `internlm2` for both families, so that key decides nothing.
    """
    names = list(names)
    if not any(".attention.wqkv." in name for name in names):
        return None
    return ARCHITECTURES[0 if any(name.startswith("vit.") for name in names) else 1]


def _compare_headers(checkpoint: Checkpoint, facts: InternLM2Facts) -> None:
    expected = facts.tensor_shapes()
    found = checkpoint.tensors
    missing = [name for name in expected if name not in found and name not in OPTIONAL_WEIGHTS]
    wrong = [
        f"{name} is {list(found[name].shape)}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    unexpected = [name for name in found if name not in expected and "rotary_emb" not in name]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("weights missing", missing), ("of another shape", wrong), ("unknown", unexpected))
        if names
    ]
    if problems:
        raise SourceError(
            f"{checkpoint.folder}: the weights are not those of its config. {'; '.join(problems)}. "
            "Download config and shards from the same revision."
        )
