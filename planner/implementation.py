"""How other code than ours runs the same modules: which of its habits cost memory or time that ours does without.

Published figures were measured with such code, and maps of ours are also used with it. Each profile says where its
habits are known from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from planner.graph import Interval, ModuleGraph, ModuleGroup
from planner.polynomial import ZERO, variable

FLOAT32 = 4
BATCH = variable("batch")
PROMPT = BATCH * (variable("text_tokens") + variable("image_tokens"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """A profile of some code.

    `logits` are made of the last position alone, or of the whole prompt, with or without a float32 copy. `rotary`
    tables of cosines and sines are made for a forward, or kept by each layer for all positions there can be. `cache`
    says how it grows: tensor by tensor, "whole" when the old one is kept until all layers have made the new one, or
    "in place" in memory that was set aside. `launches` of "fused" code are hidden behind the work. `products` of
    weights that are held in 4 bits are in the model's dtype, or in float32 with all their operands.
    """

    source: str
    logits: Literal["last", "prompt", "prompt and float32"] = "last"
    rotary: Literal["shared", "per layer"] = "shared"
    cache: Literal["by tensor", "whole", "in place"] = "by tensor"
    launches: Literal["eager", "fused"] = "eager"
    products: Literal["as the model", "float32"] = "as the model"

    @property
    def habits(self) -> str:
        """What differs from ours, in words."""
        found = [
            *([f"logits of the {self.logits}"] if self.logits != "last" else []),
            *(["rotary tables in every layer"] if self.rotary != "shared" else []),
            *([f"a cache that grows {self.cache}"] if self.cache != "by tensor" else []),
            *(["fused kernels"] if self.launches != "eager" else []),
            *(["4-bit products in float32"] if self.products == "float32" else []),
        ]
        return ", ".join(found) or "as ours"


OURS = "ours"
IMPLEMENTATIONS: Mapping[str, Implementation] = {
    OURS: Implementation(source="this project's models, and those of transformers 5"),
    "internlm-xcomposer2": Implementation(
        source="official remote code: modeling_internlm2.py keeps cos_cached and sin_cached per layer, casts all "
        "logits with .float(), and passes the cache as tuples",
        logits="prompt and float32",
        rotary="per layer",
        cache="whole",
    ),
    "qwen": Implementation(
        source="official remote code: modeling_qwen.py joins past and new keys, and returns the caches of all layers "
        "as a tuple while generate still holds the one before",
        logits="prompt",
        cache="whole",
    ),
    "glm-4": Implementation(
        source="official remote code: modeling_chatglm.py, caches as tuples. Logits: zai-org/GLM-4's own table grows "
        "by 0.31 MiB a token from 8,000 to 128,000, which is about one row of logits in 16 bits and the cache; its "
        "code asks for the last row alone (return_last_logit), so something else may fill that room. Its "
        "trans_stress_test.py gives BitsAndBytesConfig no compute dtype, whose default is float32",
        logits="prompt",
        cache="whole",
        products="float32",
    ),
    "glm-4v": Implementation(
        source="official remote code of GLM-4V-9B: as glm-4, with all logits in float32 besides (0.73 MiB a token in "
        "its own table)",
        logits="prompt and float32",
        cache="whole",
        products="float32",
    ),
    "engine": Implementation(
        source="serving engines such as LMDeploy's TurboMind: a cache of pages, and kernels that are not launched by "
        "Python",
        cache="in place",
        launches="fused",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What habits are sized by: rows of the head, width of an attention head, positions there can be, element bytes."""

    vocab_size: int
    head_dim: int
    max_positions: int
    itemsize: int


def as_implemented(graph: ModuleGraph, implementation: Implementation, sizes: Sizes) -> ModuleGraph:
    """`graph` with the costs of an implementation's habits."""
    groups = tuple(_group(group, implementation, sizes) for group in graph.groups)
    return replace(graph, groups=groups, intervals=(*graph.intervals, *_moments(graph, implementation, sizes)))


def _group(group: ModuleGroup, implementation: Implementation, sizes: Sizes) -> ModuleGroup:
    if implementation.launches == "fused":
        encode, prefill, decode = (
            cost and replace(cost, launches=ZERO) for cost in (group.encode, group.prefill, group.decode)
        )
        group = replace(group, encode=encode, prefill=prefill, decode=decode)
    if not group.kv_bytes_per_position:
        return group
    if implementation.cache == "in place" and group.decode:
        copied = BATCH * variable("positions") * (2 * group.kv_bytes_per_position)
        group = replace(group, decode=replace(group.decode, read_bytes=group.decode.read_bytes + -1 * copied))
    if implementation.rotary == "per layer":
        tables = 2 * sizes.max_positions * sizes.head_dim * sizes.itemsize
        group = replace(group, buffer_bytes=group.buffer_bytes + tables)
    return group


def _moments(graph: ModuleGraph, implementation: Implementation, sizes: Sizes) -> Iterator[Interval]:
    """Times at which habits hold most: all logits at the prompt's end, both caches at a step's."""
    if implementation.logits != "last":
        head = next(group for group in reversed(graph.groups) if group.role in ("head", "embedding"))
        element = sizes.itemsize + (FLOAT32 if implementation.logits == "prompt and float32" else 0)
        logits = PROMPT * (sizes.vocab_size * element)
        yield Interval(phase="prefill", running=head.id, held=((head.id, (logits,)),))
    if implementation.cache == "whole":
        held = tuple(
            (group.id, (BATCH * variable("positions") * group.kv_bytes_per_position,))
            for group in graph.groups
            if group.kv_bytes_per_position
        )
        yield Interval(phase="decode", running=None, held=held)
