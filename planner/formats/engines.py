"""One function per engine: from a plan to what is typed there, and what the engine decides itself."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping

from planner.errors import ConstraintError
from planner.formats.layers import gpu_order, layer_counts, positions
from planner.graph import ModuleGraph
from planner.plan import Plan

Engine = Callable[[Plan, ModuleGraph, str], str]


def engine_text(engine: str, plan: Plan, graph: ModuleGraph, model: str) -> str:
    """Lines for a shell that run `model` on an engine as planned.

    Raises: ConstraintError with the reason where the engine cannot be told so.
    """
    return ENGINES[engine](plan, graph, model)


def _vllm(plan: Plan, graph: ModuleGraph, model: str) -> str:
    # get_pp_indices in vllm/distributed/utils.py: one count per stage, their sum the number of layers. The first rank
    # has the vision encoder and the embedding, the last one the head.
    counts = layer_counts(plan, graph, "vllm")
    return _lines(
        "vLLM's own memory (its CUDA graphs, --gpu-memory-utilization) is not this plan's.",
        {"CUDA_VISIBLE_DEVICES": gpu_order(plan), "VLLM_PP_LAYER_PARTITION": _counts(counts)},
        *("vllm", "serve", model, "--pipeline-parallel-size", len(counts)),
        *("--dtype", plan.workload.dtype, "--max-model-len", positions(plan)),
        *("--max-num-seqs", plan.workload.batch_size),
    )


def _sglang(plan: Plan, graph: ModuleGraph, model: str) -> str:
    # get_pp_indices in sglang/srt/distributed/utils.py, with the same two conditions; --dtype of the server's arguments
    # knows no float32.
    if plan.workload.dtype == "float32":
        raise ConstraintError("--format sglang cannot say this plan: SGLang has no float32. Plan with --dtype bfloat16")
    counts = layer_counts(plan, graph, "sglang")
    return _lines(
        "Which multimodal models SGLang runs in a pipeline is decided there, model by model.",
        {"CUDA_VISIBLE_DEVICES": gpu_order(plan), "SGLANG_PP_LAYER_PARTITION": _counts(counts)},
        *("python3", "-m", "sglang.launch_server", "--model-path", model, "--pp-size", len(counts)),
        *("--dtype", plan.workload.dtype, "--context-length", positions(plan)),
        *("--max-running-requests", plan.workload.batch_size),
    )


def _lmdeploy(plan: Plan, graph: ModuleGraph, model: str) -> str:
    # lmdeploy/cli/utils.py: --tp "should be 2^n"; --dtype knows auto, float16 and bfloat16. Every GPU has a slice of
    # every layer, so the number of GPUs is all that a plan can tell it.
    layer_counts(plan, graph, "lmdeploy")
    num_devices = len(plan.stages)
    if num_devices & (num_devices - 1):
        raise ConstraintError(
            f"--format lmdeploy cannot say this plan: it is on {num_devices} GPUs, and --tp is a power of two. "
            "Plan with --devices for as many"
        )
    if plan.workload.dtype == "float32":
        raise ConstraintError("--format lmdeploy cannot say this plan: it has no float32. Plan with --dtype float16")
    kinds = {(device.kind, device.memory_bytes) for device in plan.machine.devices if _is_used(plan, device.index)}
    unequal = " The GPUs differ, and the smallest one decides how much fits." if len(kinds) > 1 else ""
    return _lines(
        f"LMDeploy places layers itself: each GPU gets a slice of every one, not the stages of this plan.{unequal}",
        {"CUDA_VISIBLE_DEVICES": gpu_order(plan)},
        *("lmdeploy", "serve", "api_server", model, "--tp", num_devices),
        *("--dtype", plan.workload.dtype, "--session-len", positions(plan)),
        *("--max-batch-size", plan.workload.batch_size),
    )


def _llama_cpp(plan: Plan, graph: ModuleGraph, model: str) -> str:
    # llama_model::load_tensors in src/llama-model.cpp: layer i of n is on the first device whose share of the running
    # sum of --tensor-split is above i / (n + 1); the head is layer n. Counts, with one more on the last device for the
    # head, are therefore exact. The token embedding stays on the CPU.
    counts = layer_counts(plan, graph, "llama.cpp")
    shares = (*counts[:-1], counts[-1] + 1)
    return _lines(
        "The model is a GGUF file, and what llama.cpp quantises is not this plan's: shares of layers carry over, bytes "
        "do not. It keeps the token embedding on the CPU, and places the vision part (--mmproj) itself.",
        {"CUDA_VISIBLE_DEVICES": gpu_order(plan)},
        *("llama-server", "-m", f"{model.rpartition('/')[2]}.gguf", "--n-gpu-layers", "all"),
        *("--split-mode", "layer", "--tensor-split", _counts(shares)),
        *("--ctx-size", positions(plan) * plan.workload.batch_size, "--parallel", plan.workload.batch_size),
    )


def _is_used(plan: Plan, index: int) -> bool:
    return any(stage.device == index for stage in plan.stages)


def _counts(counts: tuple[int, ...]) -> str:
    return ",".join(map(str, counts))


def _lines(note: str, variables: Mapping[str, str], *command: str | int) -> str:
    return "".join(
        (
            f"# {note}\n",
            "".join(f"{name}={value} " for name, value in variables.items()),
            shlex.join(map(str, command)) + "\n",
        )
    )


ENGINES: Mapping[str, Engine] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "lmdeploy": _lmdeploy,
    "llama.cpp": _llama_cpp,
}
