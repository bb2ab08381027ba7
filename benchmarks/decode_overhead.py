"""What hooks cost a decode step: a small model of 32 layers, split in four on the CPU device, one thread.

    python benchmarks/decode_overhead.py [--steps 300]

The same step, unhooked, under our boundaries and under accelerate's hooks, by turns, in CPU time of the one thread, so
that other processes do not count. On the CPU device nothing has to move: what is measured is the asking. Exits 1 when
our boundaries cost more than 5 percent.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import accelerate
import torch
import transformers
from accelerate import dispatch_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from runtime.boundary import attach_boundaries

NUM_LAYERS = 32
NUM_STAGES = 4
MOST = 1.05
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)
CPU = torch.device("cpu")


def unhooked() -> LlamaForCausalLM:
    """The model itself."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def with_our_boundaries() -> LlamaForCausalLM:
    """The model with a hook on every part that a plan can place, as on four devices."""
    model = unhooked()
    attach_boundaries(model, dict.fromkeys(_map(), CPU), CPU)
    return model


def with_accelerates_hooks() -> LlamaForCausalLM:
    """The model as `from_pretrained(device_map=...)` hooks it on four devices."""
    model = unhooked()
    skipped = model._skip_keys_device_placement
    dispatch_model(model, dict.fromkeys(_map(), "cpu"), main_device="cpu", skip_keys=skipped, force_hooks=True)
    return model


KINDS: dict[str, Callable[[], LlamaForCausalLM]] = {
    "unhooked": unhooked,
    "ours": with_our_boundaries,
    "accelerate": with_accelerates_hooks,
}


def _map() -> list[str]:
    ends = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    return [*ends, *(f"model.layers.{index}" for index in range(NUM_LAYERS))]


def step_times_s(num_steps: int) -> dict[str, list[float]]:
    """CPU seconds of each decode step by kind; all kinds take a step in turn, on caches of equal length."""
    torch.set_num_threads(1)
    models = {kind: make() for kind, make in KINDS.items()}
    caches = {kind: DynamicCache(config=CONFIG) for kind in KINDS}
    token = torch.ones(1, 1, dtype=torch.long)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with torch.inference_mode():
        for step in range(num_steps + 10):
            for kind, model in models.items():
                start_s = time.thread_time()
                model(token, past_key_values=caches[kind], use_cache=True)
                if step >= 10:
                    times[kind].append(time.thread_time() - start_s)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    warnings.filterwarnings("ignore", message="Some parameters are on the meta device")
    times = step_times_s(parser.parse_args().steps)
    base_s = statistics.median(times["unhooked"])
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    print(f"{NUM_LAYERS} layers in {NUM_STAGES} stages, {versions}, {platform.processor() or platform.machine()}")
    for kind, found in times.items():
        ratios = [one / bare for one, bare in zip(found, times["unhooked"], strict=True)]
        median_s = statistics.median(found)
        print(f"{kind:>10}  {median_s * 1e3:6.2f} ms  {median_s / base_s:.3f} x  (step by step {_spread(ratios)})")
    return 0 if statistics.median(times["ours"]) <= MOST * base_s else 1


def _spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f}, quartiles {low:.3f} to {high:.3f}"


if __name__ == "__main__":
    sys.exit(main())
