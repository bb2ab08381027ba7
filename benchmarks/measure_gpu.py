"""Three models with random weights: predicted beside measured peaks and times, and contexts at the edge of memory.

    python benchmarks/measure_gpu.py            writes benchmarks/measured.md

On a machine with a GPU, GPU 0 runs each model at its real size: the peaks of each phase, TTFT, TPOT, a context as long
as is claimed to fit on a card of limited memory, and one that is 5 % longer. Without a GPU the same is done as far as
that goes: peaks of tiny models on virtual GPUs, their times on the CPU, and contexts of the real models on virtual GPUs
that have sizes and no bytes. The page says which it was.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from planner.cli.measure import host_machine
from planner.machine import Device, Machine
from planner.plan import Plan
from planner.units import GIB
from planner.workload import Workload
from runtime.costs import trace_costs
from runtime.load import place_inputs
from runtime.measure import Comparison
from runtime.measuring import Findings, measured_plan
from runtime.probe import probe_machine
from runtime.proving import rehearse
from runtime.random_weights import load_random
from runtime.rehearsal import rehearsal
from vlm.cost_library import CostLibrary
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint
from vlm.largest import largest
from vlm.model import Model, find_model
from vlm.planning import plan_for
from vlm.tiny import tiny_model

PAGE = Path(__file__).with_name("measured.md")
MODELS = ("internlm-xcomposer2-vl-7b", "qwen2.5-vl-7b-instruct", "llava-1.5-7b-hf")
TINY = ("qwen2_5_vl", "llava")
WORKLOAD = Workload(prompt_tokens=1024, new_tokens=64)
TINY_WORKLOAD = Workload(prompt_tokens=256, new_tokens=32, dtype="float32")
PEAK_CLOSE, TIME_CLOSE = 1.03, 0.15
"""What a GPU's peaks and times are held to: peaks never under, and at most 3 % over; decode within 15 %."""
LONGER = 1.05
EDGE_TOKENS = 2
EDGE = Workload(prompt_tokens=64, new_tokens=EDGE_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A model on a card of so much memory: the longest context that is claimed, and which of two ran."""

    model: str
    memory_bytes: int
    context: int
    ran_claimed: bool
    ran_longer: bool


def main() -> int:
    """Measure what this machine allows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="keeps traces of models whose costs do not ship")
    costs = CostLibrary(parser.parse_args().cache, trace_costs, extrapolating=True)
    has_gpu = torch.cuda.is_available()
    found = list(measured_on_gpu(costs) if has_gpu else measured_tiny(costs))
    edges = [edge_of(find_model(name, costs.find), on_gpu=has_gpu) for name in MODELS]
    PAGE.write_text(page(found, edges, has_gpu=has_gpu), encoding="utf-8")
    wrong = list(complaints(found, edges, has_gpu=has_gpu))
    print(*wrong, sep="\n")
    return 1 if wrong else 0


def measured_on_gpu(costs: CostLibrary) -> Iterator[Findings]:
    """Each model at its real size on GPU 0."""
    machine = probe_machine().only([0])
    for name in MODELS:
        model = find_model(name, costs.find)
        yield measured_plan(model, plan_for(model, machine, WORKLOAD), random_weights=True)
        _let_go()


def measured_tiny(costs: CostLibrary) -> Iterator[Findings]:
    """Each architecture in miniature: peaks on virtual GPUs, then times on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        for path in _tiny_folders(Path(folder)):
            model = find_model(str(path), costs.find)
            for devices, machine in (("virtual", Machine.parse("2x2GiB")), ("cpu", host_machine())):
                yield measured_plan(model, plan_for(model, machine, TINY_WORKLOAD), devices=devices)
                _let_go()


def _tiny_folders(folder: Path) -> Iterator[Path]:
    yield write_random_checkpoint(folder / "internlm-xcomposer2", dtype="float32", num_layers=4, hidden_size=256)
    for model_type in TINY:
        model, _ = tiny_model(model_type)
        model.save_pretrained(folder / model_type)
        yield folder / model_type


def edge_of(model: Model, *, on_gpu: bool) -> Edge:
    """The longest context on a card that half of the model's own context fills, tried, and then one 5 % longer."""
    assert model.max_positions is not None, f"{model.name} says what it was made for"
    half = replace(EDGE, max_model_len=model.max_positions // 2)
    other = model.quantities(model.resolved(EDGE)).positions - EDGE.prompt_tokens
    half = replace(half, prompt_tokens=model.max_positions // 2 - other)
    peak = plan_for(model, card(2**50), half).memory[0].total_bytes
    claimed = largest(model, card(peak), EDGE, of="context")
    longer = int(claimed.size * LONGER)
    workloads = [claimed.workload, replace(EDGE, prompt_tokens=longer - other, max_model_len=longer)]
    runs = runs_on_gpu if on_gpu else runs_by_ledger
    ran_claimed, ran_longer = (runs(model, plan_for(model, card(2**50), one), peak) for one in workloads)
    return Edge(
        model=model.name,
        memory_bytes=peak,
        context=claimed.size,
        ran_claimed=ran_claimed,
        ran_longer=ran_longer,
    )


def card(memory_bytes: int) -> Machine:
    """One card all of whose memory is ours."""
    return Machine(devices=(Device(index=0, memory_bytes=memory_bytes, context_bytes=0, reserve_bytes=0),))


def runs_by_ledger(model: Model, plan: Plan, memory_bytes: int) -> bool:
    """Whether a run at full size, whose tensors have sizes and no bytes, stays within the memory beside a workspace."""
    peak_bytes = max(rehearse(model, plan, "ours").peak_bytes.values())
    _let_go()
    return peak_bytes + plan.memory[0].workspace_bytes <= memory_bytes


def runs_on_gpu(model: Model, plan: Plan, memory_bytes: int) -> bool:
    """Whether `generate` runs on GPU 0 when torch may take no more than this memory."""
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total_bytes), 0)
    try:
        inputs = rehearsal(model, plan.workload).inputs
        placed = load_random(model, plan)
        placed.generate(**place_inputs(placed, inputs), max_new_tokens=EDGE_TOKENS, do_sample=False)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        placed = None
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        _let_go()


def complaints(found: list[Findings], edges: list[Edge], *, has_gpu: bool) -> Iterator[str]:
    """What does not hold of the claims; times of a CPU are held to nothing."""
    for one in found:
        for row in one.rows:
            if has_gpu and row.meter != "clock" and row.ratio is not None and not 1 <= row.ratio <= PEAK_CLOSE:
                yield f"{one.ran}: {row.what} {row.meter} is predicted at {row.ratio:.3f} of what was measured"
            if has_gpu and _is_decode_time(row) and abs((row.ratio or 0) - 1) > TIME_CLOSE:
                yield f"{one.ran}: {row.what} is predicted at {row.ratio or 0:.3f} of what was measured"
    for edge in edges:
        if not edge.ran_claimed or edge.ran_longer:
            yield f"{edge.model}: {edge.context} positions ran: {edge.ran_claimed}; 5 % more: {edge.ran_longer}"


def _is_decode_time(row: Comparison) -> bool:
    return row.what == "TPOT" and row.where == "by profile"


def page(found: list[Findings], edges: list[Edge], *, has_gpu: bool) -> str:
    """benchmarks/measured.md."""
    where = torch.cuda.get_device_name(0) if has_gpu else "a machine without a GPU"
    lines = [
        "# Measured",
        "",
        f"Written by `python benchmarks/measure_gpu.py` on {where}, torch {torch.__version__}.",
        *([] if has_gpu else ["No figure here is a GPU's."]),
    ]
    for one in found:
        lines += ["", f"## {one.ran}", "", *one.notes, "", "| | | meter | predicted | measured | ratio |"]
        lines += ["|---|---|---|---:|---:|---:|", *map(_line, one.rows)]
    by = (
        "GPU 0 with torch held to that memory" if has_gpu else "virtual GPUs that have sizes and no bytes, at full size"
    )
    lines += ["", "## Contexts at the edge of memory", "", f"On {by}; a prompt that fills the context.", ""]
    lines += ["| model | memory | claimed positions | ran | 5 % more ran |", "|---|---:|---:|---|---|"]
    lines += [
        f"| {one.model} | {one.memory_bytes / GIB:.2f} GiB | {one.context:,} | {one.ran_claimed} | {one.ran_longer} |"
        for one in edges
    ]
    return "\n".join(lines) + "\n"


def _line(row: Comparison) -> str:
    show = _seconds if row.meter == "clock" else _mib
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    return f"| {row.what} | {row.where} | {row.meter} | {show(row.predicted)} | {show(row.measured)} | {ratio} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.2f} ms"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f} MiB"


def _let_go() -> None:
    """Free what the last model held before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
