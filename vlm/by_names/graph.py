"""The module graph of a model that is known by its weights' names alone, with the costs that such layers usually have.

What `Facts.assumptions` lists is assumed here. A traced graph is exact where this one errs on the side of more; unusual
code takes more still: Llama 4 sends every position to every expert, Gemma 3 makes its masks out of 64-bit indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from planner.graph import INPUTS, Flow, Fusion, ModuleGraph, ModuleGroup, Phase, PhaseCost
from planner.polynomial import ZERO, Polynomial, constant, variable
from planner.workload import ITEMSIZE, Workload
from vlm.by_names.facts import Facts
from vlm.by_names.parts import Part

BATCH = variable("batch")
PATCHES = BATCH * variable("patches")
IMAGE_TOKENS = BATCH * variable("image_tokens")
PROMPT = variable("text_tokens") + variable("image_tokens")
TOKENS = BATCH * PROMPT
POSITIONS = variable("positions")
INT64, FLOAT32 = 8, 4
LAUNCHES_PER_WEIGHT = 5
"""A decoder layer of InternLM2 has 35 kernels and 7 weights (see vlm/internlm_xcomposer2/graph.py)."""


def graph_by_names(name: str, parts: tuple[Part, ...], facts: Facts, workload: Workload) -> ModuleGraph:
    """The module graph of these parts in a workload's dtype and attention."""
    costs = _Costs(facts, ITEMSIZE[workload.dtype], eager=workload.attention == "eager")
    groups = tuple(costs.group(part) for part in parts)
    return ModuleGraph(
        name=name,
        dtype=workload.dtype,
        groups=groups,
        flows=tuple(costs.flows(groups)),
        fusions=tuple(_fusions(groups)),
        assumptions=facts.assumptions,
    )


class _Costs:
    """Costs of one part in one phase, for elements of `itemsize` bytes."""

    def __init__(self, facts: Facts, itemsize: int, *, eager: bool) -> None:
        self._facts = facts
        self._itemsize = itemsize
        self._eager = eager

    def group(self, part: Part) -> ModuleGroup:
        logits = TOKENS * (self._facts.vocab_size * (self._itemsize + FLOAT32))
        kv_width = self._facts.kv_width(part.shapes) if part.role == "decoder_layer" else 0
        in_vision = part.role in ("vision_encoder", "projector")
        return ModuleGroup(
            id=part.modules[0],
            modules=part.modules,
            role=part.role,
            module_list=part.module_list,
            num_parameters=part.num_parameters,
            weight_bytes=part.num_parameters * self._itemsize,
            kv_bytes_per_position=kv_width * self._itemsize,
            logits_bytes=logits if part.role == "head" else ZERO,
            encode=self._cost(part, PATCHES, variable("patches")) if in_vision else None,
            prefill=None if in_vision else self._cost(part, TOKENS, PROMPT),
            decode=None if in_vision else self._cost(part, BATCH, POSITIONS),
        )

    def _cost(self, part: Part, tokens: Polynomial, context: Polynomial) -> PhaseCost:
        """A part over `tokens` new positions, each of which attends to `context` positions where the part attends."""
        facts, itemsize = self._facts, self._itemsize
        matrices = facts.matrices(part.shapes)
        # A table of positions may be far wider than any state.
        width = max((min(shape[0], shape[-1]) for shape in matrices), default=facts.hidden_size)
        outputs = sum(shape[0] for shape in matrices) if part.role != "embedding" else width
        attends = part.module_list is not None
        # Residual and normed states, the latter also in float32, beside everything that the layers give.
        states = tokens * (3 * width * itemsize + 2 * width * FLOAT32)
        alive = states + tokens * (outputs * itemsize)
        cached = constant(0)
        if part.role == "decoder_layer":
            cached = BATCH * context * (facts.kv_width(part.shapes) * itemsize)
            alive += cached
        if attends and self._eager:
            alive += tokens * context * (facts.num_heads * (itemsize + FLOAT32 + itemsize))
        dense = 0 if part.role == "embedding" else sum(map(prod, matrices))
        return PhaseCost(
            moments_bytes=(alive,),
            flops=tokens * (2 * dense) + (tokens * context * (4 * width) if attends else ZERO),
            read_bytes=constant(dense * itemsize) + alive + cached,
            launches=constant(LAUNCHES_PER_WEIGHT * len(matrices)),
        )

    def flows(self, groups: tuple[ModuleGroup, ...]) -> Iterator[Flow]:
        """Hidden states from part to part; ids and mask to the embedding; the mask to every decoder layer."""
        facts, itemsize = self._facts, self._itemsize
        vision = [group.id for group in groups if group.role in ("vision_encoder", "projector")]
        embedding = next(group.id for group in groups if group.role == "embedding")
        language = [group.id for group in groups if group.role in ("decoder_layer", "norm", "head")]
        layers = [group.id for group in groups if group.role == "decoder_layer"]
        hidden = facts.hidden_size * itemsize
        yield from _chain("image_states", [*vision, embedding], "encode", PATCHES * hidden)
        phases: tuple[tuple[Phase, Polynomial, Polynomial], ...] = (
            ("prefill", TOKENS, PROMPT),
            ("decode", BATCH, POSITIONS),
        )
        for phase, tokens, context in phases:
            for tensor in ("input_ids", "attention_mask"):
                yield Flow(
                    tensor=tensor,
                    producer=INPUTS,
                    consumers=(embedding,),
                    phase=phase,
                    num_bytes=TOKENS * (2 * INT64),
                    lasting=True,
                )
            yield Flow(
                tensor="causal_mask",
                producer=embedding,
                consumers=tuple(layers),
                phase=phase,
                num_bytes=tokens * context * itemsize,
                lasting=True,
                is_buffer=True,
            )
            yield from _chain("hidden_states", [embedding, *language], phase, tokens * hidden)
            logits = BATCH * (facts.vocab_size * itemsize)
            yield Flow(tensor="logits", producer=language[-1], consumers=(INPUTS,), phase=phase, num_bytes=logits)


def _fusions(groups: tuple[ModuleGroup, ...]) -> Iterator[Fusion]:
    """All but the decoder layers, norm and head together; `--split-vision` frees the blocks of the vision path."""
    fused = [group for group in groups if group.role in ("vision_encoder", "projector", "embedding")]
    plain = tuple(group.id for group in fused if group.module_list is None)
    if len(plain) > 1:
        reason = "nobody knows which of these meet, so all of them share a device with the token embedding"
        yield Fusion(op="vision path", operands=plain, reason=reason)
    if len(fused) > 1:
        reason = "the vision encoder stays beside the merge of its features"
        yield Fusion(op="vision path", operands=tuple(group.id for group in fused), reason=reason, hard=False)


def _chain(tensor: str, names: list[str], phase: Phase, num_bytes: Polynomial) -> Iterator[Flow]:
    for producer, consumer in zip(names, names[1:], strict=False):
        yield Flow(tensor=tensor, producer=producer, consumers=(consumer,), phase=phase, num_bytes=num_bytes)
