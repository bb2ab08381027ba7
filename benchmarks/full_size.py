"""Vision-language models at their published sizes, traced and planned from configs alone, in no memory.

    python benchmarks/full_size.py                  all models; writes docs/full-size.md
    python benchmarks/full_size.py llava qwen2.5    models whose names contain one of these; writes nothing

Each model is built on the meta device in bfloat16 and must have the parameter count that was published for it. Its
prefill is 512 text tokens and one image; all atoms lie on virtual GPUs of their own, and then the groups do. A model
has a process of its own, so that memory is its own and a failure stays its own.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import platform
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from planner import InfeasibleError, Machine, Plan
from planner.units import GIB, MIB
from runtime.atoms import find_atoms
from runtime.planning import plan_model
from runtime.proof import dry_run
from runtime.steps import Steps, Watch, forward_and_decode
from runtime.trace import Trace, trace_model
from runtime.virtual.process import PROCESS
from vlm.inputs import FIRST_PLAIN_TOKEN, cache_inputs, example_inputs

TABLE = Path(__file__).parents[1] / "docs" / "full-size.md"
MACHINES = ("1x24GiB", "2x24GiB", "4x24GiB", "8x24GiB", "8x80GiB")
"""Smallest first."""
TEXT_TOKENS = 512
REPETITIONS = 2
TOLERANCE = 0.005
"""How far a count may be from the published one: those are rounded, some to three digits."""
NEEDED_S = {"LLaVA-1.5-7B": (0.8, 2.5), "Qwen2.5-VL-72B": (3.0, 8.0)}
"""What one pass and a complete trace are meant to take at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A published model: what its config has that the class's default has not, and the count it must come to.

    `source` says where the count is from. `num_images` above 1 are the tiles of one image. `image_size` is (height,
    width) in pixels, for models that take any.
    """

    name: str
    model_type: str
    published: float
    source: str
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    top: Mapping[str, Any] = field(default_factory=dict)
    num_images: int = 1
    image_size: tuple[int, int] | None = None


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **rest: Any) -> dict[str, Any]:
    """The five sizes that every decoder's config names alike."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **rest,
    }


def _vision(hidden: int, inner: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **rest,
    }


def _mrope(*section: int, theta: float, **rest: Any) -> dict[str, Any]:
    """Rotary angles by time, row and column."""
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), **rest},
    }


HEADERS = "total of the checkpoint's safetensors headers, as remembered from the hub's page"
STUDY = "published counts of typed configs"
SO400M = _vision(1152, 4304, 27, 16, patch_size=14)
"""The SigLIP encoder of 400M parameters."""
QWEN2_5_TOWER = {"depth": 32, "hidden_size": 1280, "num_heads": 16}
QWEN_PX = (448, 616)
"""1,408 patches of 14 pixels."""

ENTRIES = (
    Entry(
        name="LLaVA-1.5-7B",
        model_type="llava",
        published=7.06e9,
        source=f"{STUDY}. The class's default is this model but for 64 more rows of the vocabulary",
        text={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
    ),
    Entry(
        name="Qwen2.5-VL-7B",
        model_type="qwen2_5_vl",
        published=8.29e9,
        source=STUDY,
        text=_text(3584, 18944, 28, 28, 4, **_mrope(16, 24, 24, theta=1e6)),
        vision=QWEN2_5_TOWER | {"intermediate_size": 3420, "out_hidden_size": 3584},
        image_size=QWEN_PX,
    ),
    Entry(
        name="Qwen2.5-VL-72B",
        model_type="qwen2_5_vl",
        published=136.7 * GIB / 2,
        source="136.7 GiB in bfloat16. The text part is the class's default",
        text=_mrope(16, 24, 24, theta=1e6),
        vision=QWEN2_5_TOWER | {"intermediate_size": 3456, "out_hidden_size": 8192},
        image_size=QWEN_PX,
    ),
    Entry(
        name="InternVL3-8B",
        model_type="internvl",
        published=7.94e9,
        source=f"{STUDY}. The class's default tower with the biases that InternViT-300M has, Qwen2.5-7B's layers",
        text=_text(3584, 18944, 28, 28, 4, model_type="qwen2", vocab_size=151674),
        vision={"attention_bias": True},
        top={"tie_word_embeddings": False},
        num_images=5,
    ),
    Entry(
        name="InternVL3-78B",
        model_type="internvl",
        published=78.41e9,
        source=f"{HEADERS}: InternViT-6B before Qwen2.5-72B's layers",
        text=_text(8192, 29568, 80, 64, 8, model_type="qwen2", vocab_size=151674),
        vision=_vision(3200, 12800, 45, 25, use_qk_norm=True, norm_type="rms_norm"),
        top={"tie_word_embeddings": False},
        num_images=5,
    ),
    Entry(
        name="Gemma-3-27B",
        model_type="gemma3",
        published=27.4e9,
        source=f"{STUDY}; embedding and head are tied",
        text=_text(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, sliding_window=1024),
        vision=SO400M | {"image_size": 896, "vision_use_head": False},
    ),
    Entry(
        name="Llama-3.2-Vision-11B",
        model_type="mllama",
        published=10.64e9,
        source=f"{STUDY}. The class's default but for the image size, which the checkpoint has at 560",
        vision={"image_size": 560},
    ),
    Entry(
        name="Llama-3.2-Vision-90B",
        model_type="mllama",
        published=88.8e9,
        source="Meta's model card: 90B (88.8B)",
        text=_text(8192, 28672, 100, 64, 8, cross_attention_layers=list(range(3, 100, 5))),
        vision={"image_size": 560},
    ),
    Entry(
        name="GLM-4.1V-9B",
        model_type="glm4v",
        published=10.29e9,
        source=f"{HEADERS}. The class's default, but for the rotary sections, which it leaves to the code",
        text=_mrope(8, 12, 12, theta=1e4, partial_rotary_factor=0.5),
        image_size=QWEN_PX,
    ),
    Entry(
        name="Idefics3-8B",
        model_type="idefics3",
        published=8.46e9,
        source=f"{HEADERS}: SigLIP before Llama-3-8B's layers",
        text=_text(4096, 14336, 32, 32, 8, model_type="llama", vocab_size=128259, max_position_embeddings=131072),
        vision=SO400M | {"image_size": 364},
        num_images=5,
    ),
    Entry(
        name="Mistral-Small-3.1-24B",
        model_type="mistral3",
        published=24.01e9,
        source=f"{HEADERS}. The class's default, but for the head, which the checkpoint does not tie",
        top={"tie_word_embeddings": False},
        image_size=(784, 1120),
    ),
    Entry(
        name="Qwen3-VL-8B",
        model_type="qwen3_vl",
        published=8.77e9,
        source=f"{HEADERS}. The vision part is the class's default but for its output",
        text=_text(4096, 12288, 36, 32, 8, **_mrope(24, 20, 20, theta=5e6, mrope_interleaved=True)),
        vision={"out_hidden_size": 4096},
        image_size=(512, 704),
    ),
    Entry(
        name="GLM-4.5V",
        model_type="glm4v_moe",
        published=107.71e9,
        source=f"{HEADERS}; 106B in its name. The class's default lacks the head width of 128",
        text={"head_dim": 128, "vocab_size": 151552, **_mrope(8, 12, 12, theta=1e4, partial_rotary_factor=0.5)},
        vision={"intermediate_size": 10944},
        image_size=QWEN_PX,
    ),
    Entry(
        name="Llama-4-Scout-17B-16E",
        model_type="llama4",
        published=108.64e9,
        source=f"{HEADERS}; 109B on Meta's model card. The text part is the class's default",
        vision={"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096},
        num_images=5,
    ),
    Entry(
        name="Qwen3-VL-235B-A22B",
        model_type="qwen3_vl_moe",
        published=235.67e9,
        source="235.09B of Qwen3-235B-A22B, whose layers these are, and the 0.58B of the tower above",
        text=_text(4096, 12288, 94, 64, 4, **_mrope(24, 20, 20, theta=5e6, mrope_interleaved=True))
        | {"moe_intermediate_size": 1536, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8}
        | {"vocab_size": 151936},
        vision={"out_hidden_size": 4096},
        image_size=(512, 704),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """One complete trace, and how long its passes took."""

    trace: Trace
    decisions: int
    prefill_s: float
    complete_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model's outcome; `problem` is empty when it has a plan."""

    name: str
    cells: tuple[str, ...] = ()
    problem: str = ""
    prefill_s: float = 0.0
    complete_s: float = 0.0
    decisions: tuple[str, ...] = ()


COLUMNS = (
    "model",
    "parameters",
    "prompt",
    "atoms",
    "groups",
    "rounds",
    "merges",
    "ops of a prefill",
    "one pass, s",
    "complete trace, s",
    "first trace, s",
    "RSS growth, MiB",
    "smallest machine",
    "GPUs used",
    "KV positions",
    "room then, MiB",
    "proof",
    "decisions",
)


def build(entry: Entry) -> nn.Module:
    """The model on the meta device. Raises: AssertionError when its size is not the published one."""
    parts = {"text_config": dict(entry.text), "vision_config": dict(entry.vision)}
    # An empty part is not the same as none: it means the part's own default, not that of the whole.
    given = {name: part for name, part in parts.items() if part}
    config = CONFIG_MAPPING[entry.model_type](**given, **entry.top)
    with torch.device("meta"):
        model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(config, dtype=torch.bfloat16)
    count = num_parameters(model)
    off = abs(count - entry.published) / entry.published
    assert off <= TOLERANCE, f"{count:,} parameters, published are {entry.published:,.0f} ({entry.source})"
    return model.eval()


def num_parameters(model: nn.Module) -> int:
    """Tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def inputs_for(entry: Entry, model: Any) -> dict[str, Any]:
    """A prefill of one image and `TEXT_TOKENS` tokens, pixels in the model's dtype."""
    inputs = example_inputs(
        model, text_tokens=TEXT_TOKENS, num_images=entry.num_images, image_size=entry.image_size, batch_size=1
    )
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}


def measure(entry: Entry) -> Row:
    """The outcome of one model; to be run in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        return _measured(entry)
    except Exception as error:  # one model must not stop the others
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:300]
        return Row(
            name=entry.name,
            problem=f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})",
        )


def _measured(entry: Entry) -> Row:
    model = build(entry)
    inputs = inputs_for(entry, model)
    before_mib = _peak_rss_mib()
    runs = [_traced(model, inputs) for _ in range(REPETITIONS)]
    trace, decisions = runs[-1].trace, runs[-1].decisions
    first_s, *_ = times = [run.complete_s for run in runs]
    prefill_s, complete_s = min(run.prefill_s for run in runs), min(times)
    lines = tuple(f"{count} x {decision}" for decision, count in PROCESS.decisions.items())
    growth_mib = _peak_rss_mib() - before_mib
    counts = (find_atoms(model), [group for group in trace.groups if group])
    ops = sum(work.launches for (_, phase), work in trace.record.work.items() if phase == "prefill")
    measured = (
        f"{num_parameters(model) / 1e9:.2f}B",
        str(inputs["input_ids"].shape[1]),
        *(str(len(found)) for found in counts),
        str(trace.num_rounds),
        str(len(trace.merges)),
        f"{ops:,}",
        f"{prefill_s:.2f}",
        f"{complete_s:.2f}",
        f"{first_s:.2f}",
        f"{growth_mib:.0f}",
    )
    del trace, runs
    gc.collect()
    return Row(
        name=entry.name,
        cells=(*measured, *_planned(model, inputs), f"{decisions:,}"),
        prefill_s=prefill_s,
        complete_s=complete_s,
        decisions=lines,
    )


def _traced(model: nn.Module, inputs: Mapping[str, Any]) -> Traced:
    """One trace; the pass that counts is the fastest prefill of its rounds."""
    passes: list[float] = []
    gc.collect()
    start_s = time.perf_counter()
    trace = trace_model(model, inputs, _timed(forward_and_decode(), passes))
    complete_s = time.perf_counter() - start_s
    return Traced(trace=trace, decisions=sum(PROCESS.decisions.values()), prefill_s=min(passes), complete_s=complete_s)


def _timed(steps: Steps, passes: list[float]) -> Steps:
    """`steps` that note how long the first forward took."""

    def run(model: nn.Module, inputs: Mapping[str, Any], watch: Any) -> list[Any]:
        start_s = time.perf_counter()

        def first_only(*_: Any) -> None:
            passes.append(time.perf_counter() - start_s)
            hook.remove()

        hook = model.register_forward_hook(first_only)
        return steps(model, inputs, watch)

    return run


def _planned(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The smallest machine that holds the model, its GPUs in use, the positions that fit, and what the proof says."""
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    refusal = "weights alone are more than any machine here has"
    for spec in MACHINES:
        machine = Machine.parse(spec)
        if weight_bytes > sum(device.memory_bytes for device in machine.devices):
            continue
        try:
            plan: Plan = plan_model(model, inputs, machine=machine)
        except InfeasibleError as error:
            refusal = str(error).splitlines()[0]
            continue
        used = len(set(plan.device_map.values()))
        return spec, str(used), f"{plan.kv_tokens or 0:,}", _room(model, inputs, plan), plan.proof["status"]
    return f"none: {refusal}", "", "", "", ""


def _room(model: nn.Module, inputs: Mapping[str, Any], plan: Plan) -> str:
    """MiB that the fullest device keeps, beyond context and reserve, while it decodes at the plan's longest cache."""
    gc.collect()
    run = dry_run(model, inputs, plan, steps=partial(_decode_at, plan.kv_tokens or 0))
    usable = [d.memory_bytes - d.context_bytes - d.reserve_bytes for d in plan.machine.devices]
    rooms = [room - peak for room, peak in zip(usable, run.peak_bytes.values(), strict=False)]
    return f"{min(rooms) // MIB:,}"


def _decode_at(num_positions: int, model: Any, inputs: Mapping[str, Any], watch: Watch) -> list[Any]:
    """A prefill, and a decode step as if `num_positions` came out of it: without values a long cache costs nothing."""
    watch.phase = "prefill"
    cache = model(**inputs, **cache_inputs(model)).past_key_values
    prompt_length = inputs["input_ids"].shape[1]
    for layer in cache.layers:
        is_sliding = getattr(layer, "is_sliding", False)
        if layer.keys.shape[-2] != prompt_length and not is_sliding:
            continue  # of an image's states, which do not grow
        length = min(num_positions - 1, layer.sliding_window - 1) if is_sliding else num_positions - 1
        layer.cumulative_length = num_positions - 1
        for name in ("keys", "values"):
            shape = (*getattr(layer, name).shape[:-2], length, getattr(layer, name).shape[-1])
            longer = getattr(layer, name).new_empty(shape)
            setattr(layer, name, longer)
    watch.phase = "decode"
    new_ids = torch.full_like(inputs["input_ids"][:, :1], FIRST_PLAIN_TOKEN)
    return [model(input_ids=new_ids, past_key_values=cache, use_cache=True).logits]


def _peak_rss_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _in_own_process(entry: Entry) -> Row:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            return pool.submit(measure, entry).result()
        except BrokenProcessPool as error:
            return Row(name=entry.name, problem=f"its process died: {error}")


def _facts() -> Iterator[str]:
    """When and where this was measured."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    yield f"{date.today()}, {cpu}, {os.cpu_count()} cores (one thread used, load {os.getloadavg()[0]:.1f} at the end)"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def _table(rows: list[Row]) -> str:
    lines = [
        "# Models at full size",
        "",
        "Written by `python benchmarks/full_size.py`. Models are built on the meta device from configs whose parameter",
        f"counts match the published ones within {TOLERANCE:.1%}. The prefill has {TEXT_TOKENS} text tokens and one",
        "image: 5 tiles for InternVL3, Idefics3 and Llama 4, about 448 x 616 pixels for Qwen and GLM, 784 x 1120 for",
        "Mistral, else the one size that the model takes.",
        "",
        *(f"- {fact}" for fact in _facts()),
        "- an op of a prefill is one that computes; views and copies between devices are not counted",
        f"- times are the best of {REPETITIONS} runs: a pass is one prefill on virtual GPUs with all recording on, a",
        "  complete trace all rounds of merging with two decode steps each; the first trace of a process is slower, as",
        "  it learns the shapes that operations give",
        "- groups are what is left after merging; beyond 127 atoms neighbours in the shorter module lists start merged",
        "- a decision is a value that shape-only execution had to settle by rule, counted in the last round",
        "- RSS growth is the rise of the process's peak from the built model, inputs made, to the end of tracing",
        "- the smallest of " + ", ".join(MACHINES) + " that holds the model is planned; the plan is `balance`'s",
        "- room is what the fullest GPU keeps beyond context and reserve in a decode step at that many KV positions,",
        "  run without values; below zero the plan promises more positions than fit",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {row.name} | {' | '.join(row.cells)} |" for row in rows if not row.problem),
        "",
        "## Targets",
        "",
        *_targets(rows),
        "",
        "## Not planned",
        "",
        *([f"- {row.name}: {row.problem}" for row in rows if row.problem] or ["None."]),
        "",
        "## Where the parameter counts come from",
        "",
        *(f"- {entry.name}: {entry.published / 1e9:.2f}B, {entry.source}." for entry in ENTRIES),
        "",
    ]
    return "\n".join(lines)


def _targets(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row.name in NEEDED_S and not row.problem:
            prefill_s, complete_s = NEEDED_S[row.name]
            yield (
                f"- {row.name}: one pass {row.prefill_s:.2f} s (below {prefill_s} s wanted), "
                f"complete trace {row.complete_s:.2f} s (below {complete_s} s wanted)."
            )


def main() -> int:
    """Measure what was asked for, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    asked = [name.lower() for name in parser.parse_args().names]
    rows = []
    for entry in ENTRIES:
        if asked and not any(name in entry.name.lower() for name in asked):
            continue
        rows.append(_in_own_process(entry))
        print(f"{entry.name:22s} {rows[-1].problem or ' | '.join(rows[-1].cells)}", flush=True)
        print("".join(f"    {line}\n" for line in rows[-1].decisions), end="", flush=True)
    if not asked:
        TABLE.write_text(_table(rows), encoding="utf-8")
    return int(bool(asked) and any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
