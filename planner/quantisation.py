"""Weights of linear layers in fewer bits: how many bytes each layout takes, and a module graph that holds some so.

A layout is how one weight is held and multiplied by. `held_in` turns a graph of plain weights into that of quantised
ones: bytes, what unpacking needs for a moment, and what it reads and launches. Nothing here knows a file or a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from planner.graph import Interval, Linear, ModuleGraph, ModuleGroup, Phase, PhaseCost
from planner.paths import collapse, contains
from planner.polynomial import ZERO, Polynomial, constant, variable
from planner.workload import ITEMSIZE

FLOAT32 = 4
INT32 = 4
INT64 = 8
FLOAT16 = 2

BATCH = variable("batch")
TOKENS: Mapping[Phase, Polynomial] = {
    "encode": BATCH * variable("patches"),
    "prefill": BATCH * (variable("text_tokens") + variable("image_tokens")),
    "decode": BATCH,
}
"""Rows that a linear layer multiplies in one pass; of a vision encoder that merges patches, at most as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One multiplication by a weight: the phase's rows, and bytes of an activation's element.

    `num_rows` are as many rows as a step decodes; None for a prompt, of which kernels are chosen as for many.
    """

    tokens: Polynomial
    itemsize: int
    num_rows: int | None = None


class Layout(Protocol):
    """How the weight of a linear layer is held. `launches` are kernels of a product beyond the one of plain weights."""

    @property
    def name(self) -> str:
        """What the layout is called in plans."""

    @property
    def launches(self) -> int: ...

    def weight_bytes(self, linear: Linear, itemsize: int) -> int:
        """Bytes that stay on the device: codes, scales, zero points and code books; `itemsize` is the model dtype's."""

    def scratch_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        """Bytes that a product needs for a moment beyond those of a plain one."""

    def moved_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        """Bytes read and written for a weight in place of reading it in the model's dtype, beside the activations."""


def groups_of(count: int, size: int) -> int:
    """How many groups of `size` hold `count`, the last perhaps not full."""
    return -(-count // size)


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """bitsandbytes nf4 and fp4: blocks of 64 weights with a scale each, which `double` quantises again.

    Bytes per weight tensor: half of its elements, a float32 scale per block, 16 float32 codes. Quantised again, scales
    are a byte, with a float32 scale per 256 of them, their mean, and 256 float32 codes.
    Products are of the model's dtype, or of `product_itemsize` bytes an element: then the unpacked weight, inputs and
    results are there in both, as BitsAndBytesConfig has it where it is given no compute dtype.
    Up to `PACKED_ROWS` rows are multiplied by the packed weight, where inputs fill their blocks; more by a copy in the
    model's dtype, for as long as that takes. Room for it is counted for more rows than one, as 0.49 needs it. Scales
    that are quantised again are unpacked twice over: with and without their mean.
    Source: bitsandbytes 0.50, functional.quantize_4bit, and the choice of kernels in backends/cuda/ops.py, by which
    some GPUs multiply still more rows packed. `launches`: GLM-4V-9B makes 33.4 tokens a second in bfloat16 and 28.7 in
    fp4 on one card (THUDM/GLM-4, basic_demo/README_en.md): 4.9 ms more, though 9 ms less are read at A100 speed, over
    the 160 linear layers of its decoder.
    """

    name: str
    double: bool = False
    launches: int = 6
    product_itemsize: int | None = None

    BLOCK = 64
    SCALE_BLOCK = 256
    CODES = 16
    SCALE_CODES = 256
    PACKED_ROWS = 4

    def weight_bytes(self, linear: Linear, itemsize: int) -> int:
        blocks = groups_of(linear.num_weights, self.BLOCK)
        packed = groups_of(linear.num_weights, 2) + self.CODES * FLOAT32
        if not self.double:
            return packed + blocks * FLOAT32
        return packed + blocks + (groups_of(blocks, self.SCALE_BLOCK) + 1 + self.SCALE_CODES) * FLOAT32

    def scratch_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        scales = 2 * groups_of(linear.num_weights, self.BLOCK) * FLOAT32 if self.double else 0
        copied, cast = self._copy_bytes(linear, one, most_packed_rows=1), self.product_itemsize or 0
        weight = copied + (copied // one.itemsize) * cast
        return constant(scales + weight) + one.tokens * ((linear.rows + linear.cols) * cast)

    def moved_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        copied = self._copy_bytes(linear, one, most_packed_rows=self.PACKED_ROWS)
        return constant(self.weight_bytes(linear, one.itemsize) + 2 * copied)

    def _copy_bytes(self, linear: Linear, one: Pass, *, most_packed_rows: int) -> int:
        is_packed = one.num_rows is not None and one.num_rows <= most_packed_rows and linear.cols % self.BLOCK == 0
        return 0 if is_packed else linear.num_weights * one.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBit:
    """bitsandbytes LLM.int8: a byte per weight and a float32 scale per output.

    Inputs are turned into int8 row by row, products are int32 and become float16; inputs of another dtype are cast to
    float16 and back. `launches` count the kernels of backends/cuda/ops.py in bitsandbytes 0.50: cast, magnitude,
    comparison with the threshold, whether any is above, quantisation, product, scaling, cast back, in place of one.
    """

    name: str = "int8"
    launches: int = 7

    def weight_bytes(self, linear: Linear, itemsize: int) -> int:
        return linear.num_weights + linear.rows * FLOAT32

    def scratch_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        """int8 inputs; beside them float16 ones, their magnitudes and a byte for each that says whether it is large.

        Later, in place of those, products in int32 and float16.
        """
        return one.tokens * (linear.cols + max((2 * FLOAT16 + 1) * linear.cols, (INT32 + FLOAT16) * linear.rows))

    def moved_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        """The weight; inputs read for their magnitude and quantised; products read as int32 and as float16."""
        activations = 2 * FLOAT16 * linear.cols + (INT32 + FLOAT16) * linear.rows
        return one.tokens * activations + self.weight_bytes(linear, one.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Integer codes of 2 to 8 bits in groups of inputs with a scale each: GPTQ, AWQ.

    `group_size` None is one group. `order` says that an int32 per input names its group, as GPTQ files have. Kernels
    for few rows unpack in registers; for many, some make a copy of the weight in 16 bits (AutoAWQ from 1024 rows on,
    ExLlamaV2 from 51 on), which is counted for more rows than one. Zero points are packed like the codes.
    Source: AutoGPTQ and AutoAWQ checkpoints: qweight, qzeros (int32), scales (float16), g_idx (int32); AutoAWQ's
    linear/gemm.py and ExLlamaV2's q_gemm.cu. `launches` of `GPTQ_LAUNCHES`: Qwen-7B makes 40.93 tokens a second in
    bfloat16, 37.47 in int8 and 50.09 in int4 (its README).
    """

    name: str
    bits: int
    group_size: int | None
    order: bool = False
    launches: int = 1

    def weight_bytes(self, linear: Linear, itemsize: int) -> int:
        groups = groups_of(linear.cols, self.group_size) if self.group_size else 1
        codes = groups_of(linear.cols * self.bits, 8 * INT32) * INT32 * linear.rows
        zeros = groups * groups_of(linear.rows * self.bits, 8 * INT32) * INT32
        return codes + zeros + groups * linear.rows * FLOAT16 + (linear.cols * INT32 if self.order else 0)

    def scratch_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        return ZERO if one.num_rows == 1 else constant(linear.num_weights * FLOAT16)

    def moved_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        return constant(self.weight_bytes(linear, one.itemsize))


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """A float8 byte per weight, and a scale for the whole, per output, or per block of (outputs, inputs).

    Inputs become float8 as well, and the product is in the model's dtype. `scale_bytes` are those of one scale,
    `block` is (0, 0) for one scale, (1, 0) for one per output.
    Source: transformers 5.23, integrations/finegrained_fp8.py and fbgemm_fp8.py.
    """

    name: str = "fp8"
    block: tuple[int, int] = (128, 128)
    scale_bytes: int = FLOAT32
    launches: int = 2

    def weight_bytes(self, linear: Linear, itemsize: int) -> int:
        rows = groups_of(linear.rows, self.block[0]) if self.block[0] else 1
        cols = groups_of(linear.cols, self.block[1]) if self.block[1] else 1
        return linear.num_weights + rows * cols * self.scale_bytes

    def scratch_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        """Inputs in float8."""
        return one.tokens * linear.cols

    def moved_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        return one.tokens * (2 * linear.cols) + self.weight_bytes(linear, one.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decompressed:
    """A weight that is stored in few bits and held in the model's dtype: compressed-tensors, from its first use on.

    `kept_bytes` are those of the scales and shapes that stay beside it; where no header says them, a 16-bit scale for
    each output, or for `group_size` inputs of it, and its shape as two int64. `bits` are those in the file.
    Source: transformers 5.23, quantizers/quantizer_compressed_tensors.py, without its kernels for float8.
    """

    name: str
    bits: int
    group_size: int = 0
    has_shape: bool = False
    kept_bytes: int | None = None
    launches: int = 0

    def weight_bytes(self, linear: Linear, itemsize: int) -> int:
        kept = self.kept_bytes
        if kept is None:
            scales = linear.rows * (groups_of(linear.cols, self.group_size) if self.group_size else 1)
            kept = scales * FLOAT16 + (2 * INT64 if self.has_shape else 0)
        return linear.num_weights * itemsize + kept

    def scratch_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        return ZERO

    def moved_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        return constant(linear.num_weights * one.itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A layout of which a checkpoint's headers say the bytes: `num_bytes` of one weight and all that belongs to it."""

    layout: Layout
    num_bytes: int

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def launches(self) -> int:
        return self.layout.launches

    def weight_bytes(self, linear: Linear, itemsize: int) -> int:
        return self.num_bytes

    def scratch_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        return self.layout.scratch_bytes(linear, one)

    def moved_bytes(self, linear: Linear, one: Pass) -> Polynomial:
        return self.layout.moved_bytes(linear, one)


GPTQ_LAUNCHES: Mapping[int, int] = {4: 1}
"""Kernels by bits that a packed product takes as long as, beyond a plain one's; of other bits `MORE_LAUNCHES`."""
MORE_LAUNCHES = 3

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        EightBit(),
        FourBit(name="nf4"),
        FourBit(name="fp4"),
        FourBit(name="nf4-double", double=True),
        FourBit(name="fp4-double", double=True),
    )
}
"""What weights can be turned into while they are loaded, by the workload's `quantize`."""


def chosen_linears(graph: ModuleGraph, *, vision: bool) -> Iterator[Linear]:
    """The linear layers that are quantised on request: the language model's, with `vision` the vision path's too.

    Embedding and head stay as they are, and what is one group with them.
    """
    for group in graph:
        if is_language(group) or (vision and _is_vision(group)):
            yield from group.linears


def is_language(group: ModuleGroup) -> bool:
    """Whether a group is a layer of the language model: one that runs, which without pictures no vision layer does."""
    return group.role == "decoder_layer" and (group.prefill or group.decode) is not None


def _is_vision(group: ModuleGroup) -> bool:
    idle = group.encode is None and group.prefill is None and group.decode is None
    return group.role in ("vision_encoder", "projector") or (idle and group.role not in ("embedding", "head"))


def kept_modules(graph: ModuleGraph) -> tuple[str, ...]:
    """Modules whose linear layers all stay in the model's dtype, in shortest form, where a graph holds some otherwise.

    Modules without linear layers are as good as either, but for a head that is tied to the embedding: no layer of its
    own is listed for it, and transformers would take it for one.
    """
    held = {name for name, _ in graph.held}
    stays = {linear.name: linear.name not in held for group in graph for linear in group.linears}
    if all(group.role != "head" for group in graph):
        tied = (module for group in graph if group.role == "embedding" for module in group.modules)
        stays |= {module: True for module in tied if not any(contains(module, name) for name in stays)}
    return tuple(module for module, kept in collapse(stays).items() if kept)


def held_in(graph: ModuleGraph, layouts: Mapping[str, Layout], batch_size: int) -> ModuleGraph:
    """`graph` with the linear layers that `layouts` names held in theirs, for batches of this size.

    A small batch is multiplied by other kernels in decode.
    """
    if not layouts:
        return graph
    changes = {group.id: _Change(graph, group, layouts, batch_size) for group in graph}
    return replace(
        graph,
        groups=tuple(changes[group.id].group() for group in graph),
        intervals=tuple(_with_scratch(one, changes) for one in graph.intervals),
        held=tuple(
            (one.name, layouts[one.name].name) for group in graph for one in group.linears if one.name in layouts
        ),
        plain=graph,
    )


class _Change:
    """What becomes of one group whose linear layers are held in other layouts."""

    def __init__(self, graph: ModuleGraph, group: ModuleGroup, layouts: Mapping[str, Layout], batch_size: int) -> None:
        self._group = group
        self._itemsize = ITEMSIZE[graph.dtype]
        self._batch_size = batch_size
        self._held = [(linear, layouts[linear.name]) for linear in group.linears if linear.name in layouts]

    def group(self) -> ModuleGroup:
        if not self._held:
            return self._group
        plain = self._itemsize * sum(linear.num_weights for linear, _ in self._held)
        return replace(
            self._group,
            weight_bytes=self._group.weight_bytes
            - plain
            + sum(layout.weight_bytes(linear, self._itemsize) for linear, layout in self._held),
            encode=self._cost("encode"),
            prefill=self._cost("prefill"),
            decode=self._cost("decode"),
        )

    def scratch_bytes(self, phase: Phase) -> tuple[Polynomial, ...]:
        """What products need for a moment: the largest, or several of which the workload decides."""
        one = self._pass(phase)
        found = dict.fromkeys(layout.scratch_bytes(linear, one) for linear, layout in self._held)
        return tuple(each for each in found if each.terms and not any(o.covers(each) for o in found if o is not each))

    def _cost(self, phase: Phase) -> PhaseCost | None:
        cost = self._group.cost(phase)
        if cost is None:
            return None
        one, read, launches = self._pass(phase), cost.read_bytes, 0
        for linear, layout in self._held:
            read += layout.moved_bytes(linear, one) + -linear.num_weights * self._itemsize
            launches += layout.launches
        return replace(
            cost,
            moments_bytes=_raised(cost.moments_bytes, self.scratch_bytes(phase)),
            read_bytes=read,
            launches=cost.launches + launches,
        )

    def _pass(self, phase: Phase) -> Pass:
        num_rows = self._batch_size if phase == "decode" else None
        return Pass(tokens=TOKENS[phase], itemsize=self._itemsize, num_rows=num_rows)


def _with_scratch(interval: Interval, changes: Mapping[str, _Change]) -> Interval:
    """The interval with what the running group's products need; nobody says at which moment, so at each."""
    if interval.running is None:
        return interval
    scratch = changes[interval.running].scratch_bytes(interval.phase)
    if not scratch:
        return interval
    held = {**{interval.running: ()}, **dict(interval.held)}
    held[interval.running] = _raised(held[interval.running], scratch)
    return replace(interval, held=tuple(held.items()))


def _raised(moments: tuple[Polynomial, ...], scratch: tuple[Polynomial, ...]) -> tuple[Polynomial, ...]:
    """Every moment with each of the scratch sizes on top."""
    if not scratch:
        return moments
    return tuple(moment + more for moment in moments or (ZERO,) for more in scratch)
