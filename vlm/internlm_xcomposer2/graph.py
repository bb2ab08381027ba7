"""The module graph of InternLM2 and InternLM-XComposer2, from the config's facts alone: no torch, no weights.

It describes the forward of `modeling.py` as `load_sharded` runs it: attention fused, the cache grown by concatenation,
logits of the last position. How many activations each module holds at once was read off the virtual GPUs' ledger;
tests/runtime/test_predicted_peaks.py holds the figures against fresh runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from planner.graph import INPUTS, Flow, Fusion, ModuleGraph, ModuleGroup, Phase, PhaseCost
from planner.paths import contains
from planner.polynomial import Polynomial, constant, variable
from planner.workload import ITEMSIZE
from vlm.internlm_xcomposer2.facts import VISION, InternLM2Facts, VisionFacts

BATCH = variable("batch")
IMAGES = BATCH * variable("images")
PATCHES = BATCH * variable("patches")
IMAGE_TOKENS = BATCH * variable("image_tokens")
TOKENS = BATCH * (variable("text_tokens") + variable("image_tokens"))
PROMPT = variable("text_tokens") + variable("image_tokens")
POSITIONS = variable("positions")
EMBEDDING = "model.tok_embeddings"
INT64 = 8
FLOAT32 = 4
EAGER_SCORE = 8
"""Bytes per attention score: the score, its softmax in float32, and that in the model's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes per element of weights and activations, and of the KV cache; the name of the former's dtype.

    `padded` means that prompts of unequal length share a batch: then a mask exists and keys are repeated per head.
    """

    dtype: str
    kv_dtype: str
    padded: bool
    eager: bool

    @property
    def itemsize(self) -> int:
        """Bytes of one weight or activation."""
        return ITEMSIZE[self.dtype]


def build_graph(name: str, facts: InternLM2Facts, precision: Precision) -> ModuleGraph:
    """The module graph of a model of these facts, in execution order."""
    builder = _Builder(facts, precision)
    groups = [*builder.vision_groups(), *builder.language_groups()]
    return ModuleGraph(
        name=name,
        dtype=precision.dtype,
        groups=tuple(groups),
        flows=tuple(builder.flows(groups)),
        fusions=tuple(builder.fusions(groups)),
    )


class _Builder:
    """Facts and precision, and the groups, flows and fusions that follow from them."""

    def __init__(self, facts: InternLM2Facts, precision: Precision) -> None:
        self._facts = facts
        self._precision = precision
        self._itemsize = precision.itemsize
        self._shapes = facts.tensor_shapes()

    def vision_groups(self) -> Iterator[ModuleGroup]:
        vision = self._facts.vision
        if vision is None:
            return
        hidden = PATCHES * (vision.hidden_size * self._itemsize)
        pixels = IMAGES * (vision.num_channels * vision.image_size**2 * self._itemsize)
        stem = (f"{VISION}.embeddings", f"{VISION}.pre_layrnorm")
        yield self._group(
            stem,
            "vision_encoder",
            buffer_bytes=constant(vision.sequence_length * INT64),
            encode=PhaseCost(moments_bytes=(pixels + hidden, 3 * hidden)),
        )
        last = vision.num_hidden_layers - 1
        for index in range(vision.num_hidden_layers):
            modules = (f"{VISION}.encoder.layers.{index}", *((f"{VISION}.post_layernorm",) if index == last else ()))
            yield self._group(modules, "vision_encoder", encode=self._vision_layer_cost(vision))
        tokens = IMAGE_TOKENS * (self._facts.hidden_size * self._itemsize)
        projection = self._facts.hidden_size * (vision.hidden_size + self._facts.hidden_size)
        yield self._group(
            ("vision_proj",),
            "projector",
            encode=PhaseCost(moments_bytes=(2 * hidden + 2 * tokens,), flops=IMAGE_TOKENS * (2 * projection)),
        )

    def _vision_layer_cost(self, vision: VisionFacts) -> PhaseCost:
        """Peaks in the MLP: four hidden states, and the wide one beside two steps of its quick GELU."""
        width, inner, length = vision.hidden_size, vision.intermediate_size, vision.sequence_length
        attending = 8 * width * self._itemsize
        if self._precision.eager:
            attending += vision.num_attention_heads * length * EAGER_SCORE
        return PhaseCost(
            moments_bytes=(PATCHES * ((4 * width + 3 * inner) * self._itemsize), PATCHES * attending),
            flops=PATCHES * (2 * (4 * width**2 + 2 * width * inner) + 4 * length * width),
            read_bytes=PATCHES * (8 * width * self._itemsize),
        )

    def language_groups(self) -> Iterator[ModuleGroup]:
        """Embedding, decoder layers, norm and head, in execution order."""
        facts, itemsize = self._facts, self._itemsize
        hidden = facts.hidden_size * itemsize
        yield self._group(
            (EMBEDDING,),
            "embedding",
            logits_bytes=BATCH * (facts.vocab_size * (itemsize + 2 * FLOAT32)),
            prefill=PhaseCost(moments_bytes=(TOKENS * (2 * hidden), TOKENS * (hidden + 3 * facts.head_dim * FLOAT32))),
            decode=PhaseCost(moments_bytes=(BATCH * (hidden + 3 * facts.head_dim * FLOAT32),)),
        )
        kv_bytes = 2 * facts.num_key_value_heads * facts.head_dim * ITEMSIZE[self._precision.kv_dtype]
        for index in range(facts.num_hidden_layers):
            yield self._group(
                (f"model.layers.{index}",),
                "decoder_layer",
                kv_bytes_per_position=kv_bytes,
                prefill=self._layer_cost(TOKENS, PROMPT, IMAGE_TOKENS),
                decode=self._layer_cost(BATCH, POSITIONS, constant(0)),
            )
        norm = facts.hidden_size * (itemsize + 2 * FLOAT32)
        yield self._group(
            ("model.norm",),
            "norm",
            prefill=PhaseCost(moments_bytes=(TOKENS * norm,)),
            decode=PhaseCost(moments_bytes=(BATCH * norm,)),
        )
        head = PhaseCost(moments_bytes=(BATCH * hidden,), flops=BATCH * (2 * facts.vocab_size * facts.hidden_size))
        logits = BATCH * (facts.vocab_size * itemsize)
        yield self._group(("output",), "head", logits_bytes=logits, prefill=head, decode=head)

    def _layer_cost(self, tokens: Polynomial, context: Polynomial, image_tokens: Polynomial) -> PhaseCost:
        """A decoder layer over `tokens` new positions that see `context` positions each.

        Its peak is in the feed-forward (three hidden states; gate, up and their product), there with partial LoRA, in
        attention, or, when few positions are new, where one half of the layer's cache is grown by concatenation.
        """
        facts, itemsize = self._facts, self._itemsize
        width, inner = facts.hidden_size, facts.intermediate_size
        kv_width = facts.num_key_value_heads * facts.head_dim
        new, seen = tokens * itemsize, BATCH * context * itemsize
        attending = new * (6 * width + 2 * kv_width) + seen * kv_width
        if self._precision.padded:
            attending += seen * (2 * width)
        if self._precision.eager:
            # At the softmax: hidden states, normed ones and queries; repeated keys are gone, values not yet made.
            attending = new * (4 * width) + tokens * context * (facts.num_attention_heads * EAGER_SCORE)
        low_rank = image_tokens * ((inner + facts.plora_rank) * itemsize)
        dense, lora = self._layer_parameters()
        return PhaseCost(
            moments_bytes=(new * (3 * width + 3 * inner), new * (3 * width + 2 * inner) + low_rank, attending),
            flops=tokens * (2 * dense) + image_tokens * (2 * lora) + tokens * context * (4 * width),
            read_bytes=BATCH * context * (2 * kv_width * ITEMSIZE[self._precision.kv_dtype]),
        )

    def _layer_parameters(self) -> tuple[int, int]:
        """Matrix elements of one decoder layer that every position meets, and that image positions meet."""
        matrices = {n: prod(s) for n, s in self._shapes.items() if contains("model.layers.0", n) and len(s) == 2}
        lora = sum(elements for name, elements in matrices.items() if "Plora" in name)
        return sum(matrices.values()) - lora, lora

    def _group(self, modules: tuple[str, ...], role: str, **costs: object) -> ModuleGroup:
        shapes = [shape for name, shape in self._shapes.items() if any(contains(m, name) for m in modules)]
        parameters = sum(prod(shape) for shape in shapes)
        module_list, _, index = modules[0].rpartition(".")
        return ModuleGroup(
            id=modules[0],
            modules=modules,
            role=role,  # type: ignore[arg-type]
            module_list=module_list if index.isdigit() else None,
            num_parameters=parameters,
            weight_bytes=parameters * self._itemsize,
            **costs,  # type: ignore[arg-type]
        )

    def flows(self, groups: list[ModuleGroup]) -> Iterator[Flow]:
        """What every phase sends from group to group; the last logits return to the inputs."""
        names = {
            role: [group.id for group in groups if group.role == role] for role in ("vision_encoder", "decoder_layer")
        }
        if self._facts.vision is not None:
            yield from self._vision_flows(self._facts.vision, names["vision_encoder"])
        yield from self._language_flows("prefill", TOKENS, PROMPT, names["decoder_layer"])
        yield from self._language_flows("decode", BATCH, POSITIONS, names["decoder_layer"])

    def _vision_flows(self, vision: VisionFacts, encoder: list[str]) -> Iterator[Flow]:
        pixels = IMAGES * (vision.num_channels * vision.image_size**2 * FLOAT32)
        for phase in ("encode", "prefill", "decode"):
            yield Flow(
                tensor="pixel_values",
                producer=INPUTS,
                consumers=(encoder[0],),
                phase=phase,
                num_bytes=pixels,
                lasting=True,
            )
        hidden = PATCHES * (vision.hidden_size * self._itemsize)
        yield from _chain("patch_embeddings", [*encoder, "vision_proj"], "encode", hidden)
        features = IMAGE_TOKENS * (self._facts.hidden_size * self._itemsize)
        yield Flow(
            tensor="image_features", producer="vision_proj", consumers=(EMBEDDING,), phase="prefill", num_bytes=features
        )

    def _language_flows(
        self, phase: Phase, tokens: Polynomial, context: Polynomial, layers: list[str]
    ) -> Iterator[Flow]:
        facts, itemsize = self._facts, self._itemsize
        # The position ids that `generate` derives from the mask lie beside it.
        for tensor, num_rows in (("input_ids", 1), ("attention_mask", 2)):
            yield Flow(
                tensor=tensor,
                producer=INPUTS,
                consumers=(EMBEDDING,),
                phase=phase,
                num_bytes=TOKENS * (num_rows * INT64),
                lasting=True,
            )
        every_layer = {"position_embeddings": tokens * (2 * facts.head_dim * itemsize)}
        if facts.vision is not None and phase == "prefill":
            every_layer["image_index"] = IMAGE_TOKENS * INT64
        if self._precision.padded or self._precision.eager:
            every_layer["causal_mask"] = tokens * context * (itemsize if self._precision.eager else 1)
        for tensor, num_bytes in every_layer.items():
            yield Flow(
                tensor=tensor,
                producer=EMBEDDING,
                consumers=tuple(layers),
                phase=phase,
                num_bytes=num_bytes,
                lasting=True,
                is_buffer=tensor != "image_index",
            )
        hidden = tokens * (facts.hidden_size * itemsize)
        if facts.vision is not None and phase == "prefill":
            # The joined embeddings are an argument of the whole forward, and live as long as it runs.
            yield Flow(
                tensor="inputs_embeds",
                producer=EMBEDDING,
                consumers=(EMBEDDING,),
                phase=phase,
                num_bytes=hidden,
                lasting=True,
            )
        yield from _chain("hidden_states", [EMBEDDING, *layers, "model.norm", "output"], phase, hidden)
        logits = BATCH * (facts.vocab_size * itemsize)
        yield Flow(tensor="logits", producer="output", consumers=(INPUTS,), phase=phase, num_bytes=logits)

    def fusions(self, groups: list[ModuleGroup]) -> Iterator[Fusion]:
        """What must share a device, and what does unless `--split-vision` says otherwise."""
        if self._facts.vision is not None:
            yield Fusion(
                op="torch.cat",
                operands=("vision_proj", EMBEDDING),
                reason="text and image embeddings are joined where they are, without moving either",
            )
            yield Fusion(
                op="vision path",
                operands=tuple(group.id for group in groups if group.role in ("vision_encoder", "projector")),
                reason="the vision encoder stays beside the merge of its features",
                hard=False,
            )
        if self._facts.tie_word_embeddings:
            yield Fusion(op="tied weight", operands=(EMBEDDING, "output"), reason="both modules hold one tensor")


def _chain(tensor: str, names: list[str], phase: Phase, num_bytes: Polynomial) -> Iterator[Flow]:
    for producer, consumer in zip(names, names[1:], strict=False):
        yield Flow(tensor=tensor, producer=producer, consumers=(consumer,), phase=phase, num_bytes=num_bytes)
