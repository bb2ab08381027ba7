"""The module graph of InternLM2 and InternLM-XComposer2, from the config's facts alone: no torch, no weights.

It describes the forward of `modeling.py` as `load_sharded` runs it: attention fused, the cache grown by concatenation,
logits of the last position. How many activations each module holds at once was read off the virtual GPUs' ledger;
tests/runtime/test_predicted_peaks.py holds the figures against fresh runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from planner.graph import INPUTS, Flow, Fusion, ModuleGraph, ModuleGroup, Phase, PhaseCost
from planner.paths import contains
from planner.polynomial import Polynomial, constant, variable
from planner.workload import ITEMSIZE
from vlm.internlm_xcomposer2.facts import VISION, InternLM2Facts, Shape, VisionFacts, linears_by_group

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
EAGER_READS = 4
"""Times that eager attention reads its scores: scaling, mask, softmax, product with the values."""
NORM_LAUNCHES = 6
LAYER_LAUNCHES = 35
"""Of a decoder layer over text; counted, like all launches here, by a trace (tests/runtime/test_graph_work.py)."""
EAGER_LAUNCHES, EAGER_STEP_LAUNCHES, PADDED_LAUNCHES = 7, 6, 2
"""More of a decoder layer: scores step by step, in prefill and decode; prefill's repeated keys and values."""
LORA_LAUNCHES = 20
"""More of a decoder layer with images: four for each of its five linears, however many images there are."""
EMBEDDING_LAUNCHES, MASK_LAUNCHES = 11, 12
VISION_LAUNCHES, EAGER_VISION_LAUNCHES = 14, 4


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
        self._parameters = _parameters_by_module(self._shapes)
        self._linears = linears_by_group(self._shapes)

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
            encode=self._stem_cost(vision, pixels, hidden),
        )
        last = vision.num_hidden_layers - 1
        layer = self._vision_layer_cost(vision)
        for index in range(vision.num_hidden_layers):
            modules = (f"{VISION}.encoder.layers.{index}", *((f"{VISION}.post_layernorm",) if index == last else ()))
            yield self._group(modules, "vision_encoder", encode=layer)
        tokens = IMAGE_TOKENS * (self._facts.hidden_size * self._itemsize)
        projection = self._facts.hidden_size * (vision.hidden_size + self._facts.hidden_size)
        yield self._group(
            ("vision_proj",),
            "projector",
            encode=PhaseCost(
                moments_bytes=(2 * hidden + 2 * tokens,),
                flops=IMAGE_TOKENS * (2 * projection),
                read_bytes=projection * self._itemsize + hidden + 2 * tokens,
                launches=constant(3),
            ),
        )

    def _stem_cost(self, vision: VisionFacts, pixels: Polynomial, hidden: Polynomial) -> PhaseCost:
        """Patches as a convolution, class token and positions added, and a norm."""
        kernel = vision.num_channels * vision.patch_size**2 * vision.hidden_size
        table = vision.sequence_length * vision.hidden_size
        return PhaseCost(
            moments_bytes=(pixels + hidden, 3 * hidden),
            flops=PATCHES * (2 * kernel),
            read_bytes=pixels + 4 * hidden + (kernel + table) * self._itemsize,
            launches=constant(5),
        )

    def _vision_layer_cost(self, vision: VisionFacts) -> PhaseCost:
        """Peaks in the MLP: four hidden states, and the wide one beside two steps of its quick GELU.

        A patch's states are read 14 times at the layer's width (norms, projections, attention, additions) and 5 times
        at the inner one.
        """
        width, inner, length = vision.hidden_size, vision.intermediate_size, vision.sequence_length
        eager = self._precision.eager
        scores = vision.num_attention_heads * length if eager else 0
        attending = 8 * width * self._itemsize + scores * EAGER_SCORE
        matrices = 4 * width**2 + 2 * width * inner
        return PhaseCost(
            moments_bytes=(PATCHES * ((4 * width + 3 * inner) * self._itemsize), PATCHES * attending),
            flops=PATCHES * (2 * matrices + 4 * length * width),
            read_bytes=matrices * self._itemsize
            + PATCHES * ((14 * width + 5 * inner + EAGER_READS * scores) * self._itemsize),
            launches=constant(VISION_LAUNCHES + (EAGER_VISION_LAUNCHES if eager else 0)),
        )

    def language_groups(self) -> Iterator[ModuleGroup]:
        """Embedding, decoder layers, norm and head, in execution order."""
        facts, itemsize = self._facts, self._itemsize
        hidden = facts.hidden_size * itemsize
        angles = 3 * facts.head_dim * FLOAT32
        # Only the rows of the table that are looked up are read.
        work = {"launches": constant(EMBEDDING_LAUNCHES + (MASK_LAUNCHES if self._masked else 0))}
        yield self._group(
            (EMBEDDING,),
            "embedding",
            logits_bytes=BATCH * (facts.vocab_size * (itemsize + 2 * FLOAT32)),
            prefill=PhaseCost(
                moments_bytes=(TOKENS * (2 * hidden), TOKENS * (hidden + angles)),
                read_bytes=TOKENS * (2 * hidden + angles),
                **work,
            ),
            decode=PhaseCost(moments_bytes=(BATCH * (hidden + angles),), read_bytes=BATCH * (hidden + angles), **work),
        )
        kv_bytes = 2 * facts.num_key_value_heads * facts.head_dim * ITEMSIZE[self._precision.kv_dtype]
        prefill, decode = (
            self._layer_cost(TOKENS, PROMPT, IMAGE_TOKENS),
            self._layer_cost(BATCH, POSITIONS, constant(0)),
        )
        for index in range(facts.num_hidden_layers):
            yield self._group(
                (f"model.layers.{index}",),
                "decoder_layer",
                kv_bytes_per_position=kv_bytes,
                prefill=prefill,
                decode=decode,
            )
        yield self._group(("model.norm",), "norm", prefill=self._norm_cost(TOKENS), decode=self._norm_cost(BATCH))
        head = PhaseCost(
            moments_bytes=(BATCH * hidden,),
            flops=BATCH * (2 * facts.vocab_size * facts.hidden_size),
            read_bytes=constant(facts.vocab_size * hidden) + BATCH * hidden,
            launches=constant(1),
        )
        logits = BATCH * (facts.vocab_size * itemsize)
        yield self._group(("output",), "head", logits_bytes=logits, prefill=head, decode=head)

    @property
    def _masked(self) -> bool:
        """Whether a mask is made: sdpa does without one for a single sequence."""
        return self._precision.padded or self._precision.eager

    def _norm_cost(self, tokens: Polynomial) -> PhaseCost:
        width = self._facts.hidden_size
        return PhaseCost(
            moments_bytes=(tokens * (width * (self._itemsize + 2 * FLOAT32)),),
            read_bytes=tokens * self._norm_reads + width * self._itemsize,
            launches=constant(NORM_LAUNCHES),
        )

    @property
    def _norm_reads(self) -> int:
        """Bytes that a norm reads per position: squares, their mean and the scaling in float32, the weighing."""
        return self._facts.hidden_size * (3 * FLOAT32 + self._itemsize)

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
            read_bytes=self._layer_reads(tokens, context, image_tokens),
            launches=self._layer_launches(prefill=context is PROMPT),
        )

    def _layer_reads(self, tokens: Polynomial, context: Polynomial, image_tokens: Polynomial) -> Polynomial:
        """Weights; every operand of the forward at its width; the cache, by attention and, twice, where it is grown.

        Per position: inputs of the five linears; of the rotation 5.5 times queries and keys; queries twice; residuals;
        gate and product. At image positions the low-rank half reads each linear's input twice and its output twice.
        """
        facts, itemsize = self._facts, self._itemsize
        width, inner = facts.hidden_size, facts.intermediate_size
        kv_width = facts.num_key_value_heads * facts.head_dim
        dense, lora = self._layer_parameters()
        states = (31 * width + 11 * kv_width) // 2 + 4 * inner
        read = dense * itemsize + tokens * (states * itemsize + 2 * self._norm_reads)
        read += BATCH * context * (6 * kv_width * ITEMSIZE[self._precision.kv_dtype])
        if lora:
            low_rank = 2 * (4 * width + inner) + 2 * (3 * width + 2 * kv_width + 2 * inner) + 5 * facts.plora_rank
            read += image_tokens * (low_rank * itemsize)
            if image_tokens.terms:
                read += variable("images") * (lora * itemsize)
        if self._precision.eager:
            read += tokens * context * (EAGER_READS * facts.num_attention_heads * itemsize)
        # One new token of each sequence is attended to without repeating keys.
        if self._precision.eager or (self._precision.padded and context is PROMPT):
            read += BATCH * context * (2 * width * itemsize)
        return read

    def _layer_launches(self, *, prefill: bool) -> Polynomial:
        """Kernels of one pass; with images, exact for one a sequence and above for more."""
        if self._precision.eager:
            extra = EAGER_LAUNCHES if prefill else EAGER_STEP_LAUNCHES
        else:
            extra = PADDED_LAUNCHES if self._precision.padded and prefill else 0
        launches = constant(LAYER_LAUNCHES + extra)
        return launches + LORA_LAUNCHES * variable("images") if prefill and self._facts.vision else launches

    def _layer_parameters(self) -> tuple[int, int]:
        """Matrix elements of one decoder layer that every position meets, and that image positions meet."""
        matrices = {n: prod(s) for n, s in self._shapes.items() if contains("model.layers.0", n) and len(s) == 2}
        lora = sum(elements for name, elements in matrices.items() if "Plora" in name)
        return sum(matrices.values()) - lora, lora

    def _group(self, modules: tuple[str, ...], role: str, **costs: object) -> ModuleGroup:
        parameters = sum(self._parameters[module] for module in modules)
        module_list, _, index = modules[0].rpartition(".")
        return ModuleGroup(
            id=modules[0],
            modules=modules,
            role=role,  # type: ignore[arg-type]
            module_list=module_list if index.isdigit() else None,
            num_parameters=parameters,
            weight_bytes=parameters * self._itemsize,
            linears=tuple(linear for module in modules for linear in self._linears.get(module, ())),
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


def _parameters_by_module(shapes: Mapping[str, Shape]) -> Counter[str]:
    """Parameters inside every module, at any depth; none for a module without any."""
    counted: Counter[str] = Counter()
    for name, shape in shapes.items():
        segments = name.split(".")
        for depth in range(1, len(segments)):
            counted[".".join(segments[:depth])] += prod(shape)
    return counted


def _chain(tensor: str, names: list[str], phase: Phase, num_bytes: Polynomial) -> Iterator[Flow]:
    for producer, consumer in zip(names, names[1:], strict=False):
        yield Flow(tensor=tensor, producer=producer, consumers=(consumer,), phase=phase, num_bytes=num_bytes)
