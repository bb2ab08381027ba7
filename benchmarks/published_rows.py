"""Published memory and speed of running models, as their authors give them: what published.py predicts.

A reason for not scoring a row is a fact about the row: that it contradicts its own table, or says too little.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.units import GIB

GPTQ = {"quant_method": "gptq", "group_size": 128, "desc_act": True, "sym": True}
INT8 = {"quantization_config": {**GPTQ, "bits": 8}}
INT4 = {"quantization_config": {**GPTQ, "bits": 4}}
AWQ4 = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}

QWEN = "QwenLM/Qwen README: A100-80G, 2,048 tokens generated from one"
QWEN_LENGTH = "QwenLM/Qwen README, KV cache quantisation: Qwen-7B in bfloat16, by length of what is generated"
QWEN_BATCH = "QwenLM/Qwen README, KV cache quantisation: Qwen-7B in bfloat16, 1,024 tokens generated, by batch"
QWEN_EARLY = "QwenLM/Qwen README, first revision"
GLM = "zai-org/GLM-4, basic_demo/README_en.md at 0423d7c: GLM-4-9B-Chat on A100-80G, by tokens of the prompt"
GLM_1M = "zai-org/GLM-4, basic_demo/README_en.md at 0423d7c: GLM-4-9B-Chat-1M"
GLM_0414 = "zai-org/GLM-4 README: GLM-4-9B-0414, by tokens of the prompt"
GLM_4V = "zai-org/GLM-4, basic_demo/README_en.md at 0423d7c: GLM-4V-9B on A100-80G, a picture and tokens of the prompt"

NO_INT8 = "not predicted: its kernels keep keys and values in int8, which no cache here does"
SMALL_CARD = "a CUDA context of 0.49 GiB is a tenth of it"
PICTURE_ON_TOP = "from above: the picture's 1,602 positions are taken to come on top of the tokens"
NO_ROOM = "from above: in int4 the table grows by {growth} MiB a token, too little for logits as in 16 bits"
ANSWER_TOKENS = 128
"""New tokens where a table gives the prompt alone: its peak is at the prompt's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """A published peak, in the table's own unit, None for out of memory; and what was run.

    `unit` is that unit's bytes where the table leaves no doubt; "GB" does.
    `config` adds to the model's. `unscored` is the reason why a row is shown without being scored; one without a model
    cannot be predicted either. `step` is what the table's figures are rounded to, `note` what a reader should know.
    """

    table: str
    what: str
    published: float | None
    unit: int | None = None
    model: str = ""
    gpus: str = "a100-80g"
    implementation: str = "ours"
    workload: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    unscored: str = ""
    step: float = 0.01
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """Published tokens per second of a whole batch, and what was run; `decode_only` leaves the prompt's time out."""

    table: str
    what: str
    published: float
    model: str
    implementation: str
    workload: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    gpus: str = "a100-80g"
    decode_only: bool = True
    note: str = ""


def memory_rows() -> Iterator[MemoryRow]:
    """All rows, table by table."""
    yield from _qwen_sizes()
    yield from _qwen_cache()
    yield from _glm()
    yield from _glm_4v()
    yield from _without_a_model()


def _qwen_sizes() -> Iterator[MemoryRow]:
    published = {
        "1.8b": (4.23, 3.48, 2.91),
        "7b": (16.99, 11.20, 8.21),
        "14b": (30.15, 18.81, 13.01),
        "72b": (144.69, 81.27, 48.86),
    }
    two = {("72b", "bfloat16"), ("72b", "int8")}
    for size, figures in published.items():
        for precision, config, figure in zip(("bfloat16", "int8", "int4"), ({}, INT8, INT4), figures, strict=True):
            yield MemoryRow(
                table=QWEN,
                what=f"Qwen-{size.upper()} {precision}",
                published=figure,
                model=f"qwen-{size.replace('.', '_')}-chat",
                gpus="2xa100-80g" if (size, precision) in two else "a100-80g",
                implementation="qwen",
                workload={"prompt_tokens": 1, "new_tokens": 2048, "dtype": "bfloat16"},
                config=config,
                note=SMALL_CARD if size == "1.8b" else "",
            )


def _qwen_cache() -> Iterator[MemoryRow]:
    for length, figure in {512: 15.2, 1024: 16.3, 2048: 17.6, 4096: 19.5, 8192: 23.2}.items():
        yield _qwen_7b(QWEN_LENGTH, f"{length:,} tokens", figure, new_tokens=length)
    for length, figure in {512: 15.0, 1024: 15.5, 2048: 15.8, 4096: 16.6, 8192: 17.6}.items():
        yield MemoryRow(table=QWEN_LENGTH, what=f"{length:,} tokens, int8 cache", published=figure, unscored=NO_INT8)
    reason = "contradicts its table: 2.6 GB a sequence from 1 to 4, 0.6 from 4 to 16, 1.1 from 16 to 32"
    for batch, figure in {1: 16.3, 4: 24.1, 16: 31.7, 32: 48.7, 64: None, 100: None}.items():
        yield _qwen_7b(
            QWEN_BATCH,
            f"batch {batch}",
            figure,
            new_tokens=1024,
            batch_size=batch,
            unscored=reason if batch == 4 else "",
        )
    for batch, figure in {1: 15.5, 4: 17.2, 16: 22.3, 32: 30.2, 64: 48.2, 100: 72.4}.items():
        yield MemoryRow(table=QWEN_BATCH, what=f"batch {batch}, int8 cache", published=figure, unscored=NO_INT8)


def _qwen_7b(table: str, what: str, figure: float | None, *, unscored: str = "", **workload: Any) -> MemoryRow:
    return MemoryRow(
        table=table,
        what=what,
        published=figure,
        model="qwen-7b-chat",
        implementation="qwen",
        workload={"prompt_tokens": 1, "dtype": "bfloat16", **workload},
        unscored=unscored,
        step=0.1,
    )


def _glm() -> Iterator[MemoryRow]:
    for length, figure in {1000: 19047, 8000: 20629, 32000: 27779, 128000: 57379}.items():
        yield _glm_row(GLM, f"bfloat16, {length:,} tokens", figure, "glm-4-9b-chat", "glm-4", length)
    for length, figure in {1000: 8251, 8000: 9613, 32000: 16065}.items():
        yield _glm_row(GLM, f"int4, {length:,} tokens", figure, "glm-4-9b-chat", "glm-4", length, quantize="fp4")


def _glm_4v() -> Iterator[MemoryRow]:
    for precision, figures in {"bfloat16": {1000: 28131, 8000: 33043}, "int4": {1000: 10267, 8000: 14105}}.items():
        held = {"quantize": "fp4", "quantize_vision": True} if precision == "int4" else {}
        for length, figure in figures.items():
            what = f"{precision}, {length:,} tokens"
            yield _glm_row(GLM_4V, what, figure, "glm-4v-9b", "glm-4v", length, num_images=1, **held)


def _glm_row(
    table: str, what: str, mib: int, model: str, implementation: str, length: int, **workload: Any
) -> MemoryRow:
    """A row of tables that are in MiB."""
    return MemoryRow(
        table=table,
        what=what,
        published=round(mib / 1024, 2),
        unit=GIB,
        model=model,
        implementation=implementation,
        workload={"prompt_tokens": length, "new_tokens": ANSWER_TOKENS, "dtype": "bfloat16", **workload},
        note=_glm_note(with_picture="num_images" in workload, in_4_bits="quantize" in workload, length=length),
    )


def _glm_note(*, with_picture: bool, in_4_bits: bool, length: int) -> str:
    if in_4_bits and (with_picture or length > 1000):
        return NO_ROOM.format(growth=0.55 if with_picture else 0.27)
    return PICTURE_ON_TOP if with_picture else ""


def _without_a_model() -> Iterator[MemoryRow]:
    early = "says neither prompt nor answer, and contradicts the table above"
    for precision, figure in {"bfloat16": 16.2, "int8": 10.1, "nf4": 7.4}.items():
        yield MemoryRow(table=QWEN_EARLY, what=f"Qwen-7B {precision}", published=figure, unscored=early)
    yield MemoryRow(
        table=GLM_1M,
        what="bfloat16, 200,000 tokens",
        published=72.75,
        unit=GIB,
        unscored="its sizes are in no source that was read, and logits of that prompt alone would be 56 GiB",
    )
    reason = "contradicts its table: 0.9 MB a token from 1,000 to 8,000, 0.25 to 32,000, 0.35 to 100,000"
    for length, figure in {1000: 19, 8000: 25, 32000: 31, 100000: 55}.items():
        yield MemoryRow(table=GLM_0414, what=f"bfloat16, {length:,} tokens", published=figure, unscored=reason)


TURBOMIND = "LMDeploy's TurboMind, Llama-2-7B on A100-80G, 128 tokens in and 128 out, by batch"
SPEEDS = "QwenLM/Qwen README: Qwen-7B on A100-80G, 2,048 tokens generated"


def speed_rows() -> Iterator[SpeedRow]:
    """All rows, table by table, a precision after the other."""
    for precision, config, figure in (("bfloat16", {}, 40.93), ("int8", INT8, 37.47), ("int4", INT4, 50.09)):
        yield SpeedRow(
            table=SPEEDS,
            what=precision,
            published=figure,
            model="qwen-7b-chat",
            implementation="qwen",
            workload={"prompt_tokens": 1, "new_tokens": 2048, "dtype": "bfloat16"},
            config=config,
        )
    yield from _glm_4v_speeds()
    yield from _turbomind()


def _glm_4v_speeds() -> Iterator[SpeedRow]:
    held = {"quantize": "fp4", "quantize_vision": True}
    note = "contradicts its table: faster with the longer prompt"
    published = {
        "bfloat16, 1,000 tokens": (33.4, {}, ""),
        "int4, 1,000 tokens": (28.7, held, ""),
        "bfloat16, 8,000 tokens": (39.2, {}, note),
        "int4, 8,000 tokens": (24.2, held, ""),
    }
    for what, (figure, precision, remark) in published.items():
        length = int(what.split()[1].replace(",", ""))
        yield SpeedRow(
            table=GLM_4V,
            what=what,
            published=figure,
            model="glm-4v-9b",
            implementation="glm-4v",
            workload={"prompt_tokens": length, "new_tokens": ANSWER_TOKENS, "dtype": "bfloat16", **precision},
            note=remark,
        )


def _turbomind() -> Iterator[SpeedRow]:
    batches = (1, 16, 32, 64, 128, 256)
    plain = (103.55, 1296.88, 2226.09, 3448.22, 3523.22, 5173.37)
    packed = (250.94, 2432.64, 3273.46, 4095.8, 4734.49, 5181.72)
    for batch, *figures in zip(batches, plain, packed, strict=True):
        for precision, config, figure in zip(("float16", "int4"), ({}, AWQ4), figures, strict=True):
            yield SpeedRow(
                table=TURBOMIND,
                what=f"{precision}, batch {batch}",
                published=figure,
                model="llama-2-7b-hf",
                implementation="engine",
                workload={"prompt_tokens": 128, "new_tokens": 128, "batch_size": batch, "dtype": "float16"},
                config=config,
                decode_only=False,
            )
