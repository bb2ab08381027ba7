"""Our plans beside what others would do, by one evaluator: transformers' maps, and rules published for model families.

`python benchmarks/peers.py` writes docs/peers.md. Needs torch and transformers, whose own code makes its maps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import accelerate
import torch
import transformers

from planner.constraints import Constraints
from planner.errors import ConstraintError, UnsupportedModelError
from planner.graph import ModuleGraph
from planner.machine import Machine
from planner.paths import contains, owner
from planner.problem import Evaluation, Objective, PlacedStage, Problem, evaluate
from planner.solve import chain_dp
from planner.workload import Workload
from runtime.diagnosis.auto_maps import auto_map
from vlm.catalogue import catalogue_names, lookup
from vlm.model import Model, find_model
from vlm.planning import problem_for
from vlm.skeleton import build_skeleton

TABLE = Path(__file__).parents[1] / "docs" / "peers.md"
MACHINES = (
    *("2xrtx3090", "4xt4", "8xl4", "2xa100-40g"),
    *("rtx4090,l4", "rtx4090,rtx2080ti,t4", "a100-40g,rtx3090,t4", "2xrtx3090,2xrtx2080ti"),
    *("a100-80g,rtx-a6000,rtx3090", "t4,rtx2080ti,t4,rtx3090"),
)
STRATEGIES = ("auto", "balanced_low_0", "sequential")
OURS: tuple[tuple[Objective, bool], ...] = tuple(
    (objective, split) for split in (False, True) for objective in ("balance", "latency", "throughput")
)

DeviceMap = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One planner's answer on one machine; `note` says why there is none that can be scored."""

    planner: str
    note: str = ""
    kv_positions: int | None = None
    tpot_s: float | None = None
    latency_s: float | None = None
    bottleneck_s: float | None = None
    num_devices: int = 0

    @property
    def fits(self) -> bool:
        """Whether every device holds what is placed on it."""
        return not self.note


def internvl_rule(graph: ModuleGraph, num_devices: int) -> DeviceMap:
    """InternVL's published split: the first GPU counts as half a one, and holds all that is no decoder layer, and the
    last of those.

    Source: OpenGVLab/InternVL, internvl_chat/README.md, split_model.
    """
    layers = [group.id for group in graph if group.role == "decoder_layer"]
    per_device = ceil(len(layers) / (num_devices - 0.5))
    slots = [0] * ceil(per_device * 0.5)
    slots += [device for device in range(1, num_devices) for _ in range(per_device)]
    placed = {layer: slots[index] for index, layer in enumerate(layers)}
    return {group.id: placed.get(group.id, 0) for group in graph} | {layers[-1]: 0}


def xcomposer_rule(graph: ModuleGraph, num_devices: int) -> DeviceMap:
    """InternLM-XComposer2's published split: 38 units over the GPUs, the vision encoder and the ends counted as six.

    Source: InternLM/InternLM-XComposer, InternLM-XComposer-2.0/examples/utils.py, auto_configure_device_map.
    """
    per_device, device, used = 38 / num_devices, 0, 3
    placed: dict[str, int] = {}
    has_begun = False
    for group in graph:
        if group.role == "decoder_layer":
            has_begun = True
            if used >= per_device:
                device, used = device + 1, 0
            placed[group.id] = device
            used += 1
        else:
            placed[group.id] = num_devices - 1 if has_begun else 0
    return placed


RULES: dict[str, Callable[[ModuleGraph, int], DeviceMap]] = {
    "InternVL's rule": internvl_rule,
    "XComposer2's rule": xcomposer_rule,
}


def stages_of(graph: ModuleGraph, device_map: DeviceMap, machine: Machine) -> tuple[PlacedStage, ...] | str:
    """The placement that a map amounts to, or why it cannot be scored: what must share a device has to."""
    members: dict[int, list[int]] = {}
    placed: dict[str, Any] = {}
    position = {device.index: place for place, device in enumerate(machine.devices)}
    for index, group in enumerate(graph):
        found = {device_map.get(owner(module, device_map) or "") for module in group.modules}
        found |= {device_map[name] for name in device_map if name and any(contains(m, name) for m in group.modules)}
        if len(found) > 1:
            return f"cuts {group.id}"
        (device,) = found
        if device not in position:
            return f"names GPU {device}, which is not there" if isinstance(device, int) else f"offloads to {device}"
        members.setdefault(position[device], []).append(index)
        placed[group.id] = device
    for fusion in graph.fusions:
        if fusion.hard and len({placed[operand] for operand in fusion.operands}) > 1:
            return f"fails: {fusion.op} of {' and '.join(fusion.operands)}"
    return tuple(PlacedStage(device=device, members=tuple(groups)) for device, groups in members.items())


def row_of(planner: str, problem: Problem, stages: tuple[PlacedStage, ...] | str) -> Row:
    """The evaluator's figures for a placement."""
    if isinstance(stages, str):
        return Row(planner, note=stages)
    found = evaluate(problem, stages)
    if not found.fits:
        return Row(planner, note=f"does not fit: {_shortfall(problem, found)}")
    times = found.times
    assert times is not None  # all machines here are of known models
    return Row(
        planner,
        kv_positions=found.kv_positions,
        tpot_s=times.total.token_ns / 1e9,
        latency_s=times.latency_ns / 1e9,
        bottleneck_s=times.bottleneck_ns / 1e9,
        num_devices=len(stages),
    )


def _shortfall(problem: Problem, found: Evaluation) -> str:
    pairs = zip(problem.machine.devices, found.memory, strict=True)
    lacking = max(memory.total_bytes - device.memory_bytes for device, memory in pairs)
    return f"{lacking / 2**30:.1f} GiB too much on one"


def rows_for(model: Model, skeleton: torch.nn.Module, spec: str) -> Iterator[Row]:
    """Ours first, then the others."""
    machine, asked = Machine.parse(spec), Workload()
    problem = problem_for(model, machine, asked, Constraints())
    for objective, split in OURS:
        limits = Constraints(split_vision=split)
        ours = replace(problem_for(model, machine, asked, limits), objective=objective)
        name = f"ours, {objective}{', split vision' if split else ''}"
        try:
            solution = chain_dp.solve(ours)
        except ConstraintError as refusal:
            yield Row(name, note=str(refusal))
            continue
        yield row_of(name, ours, "does not fit" if solution.status == "INFEASIBLE" else solution.stages)
    for strategy in STRATEGIES:
        try:
            entries = auto_map(skeleton, strategy, machine).placement
        except UnsupportedModelError:
            yield Row(f"transformers {strategy}", note="makes no map")
            continue
        yield row_of(f"transformers {strategy}", problem, stages_of(problem.graph, entries, machine))
    for name, rule in RULES.items():
        if len(machine.devices) > 1:
            by_position = rule(problem.graph, len(machine.devices))
            yield row_of(name, problem, stages_of(problem.graph, by_group(problem.graph, by_position), machine))


def by_group(graph: ModuleGraph, placed: DeviceMap) -> DeviceMap:
    """A map of group ids as a map of their modules."""
    return {module: placed[group.id] for group in graph for module in group.modules}


def worse(rows: list[Row]) -> list[str]:
    """Where another planner beats the better of ours in what ours is made for."""
    ours = {row.planner: row for row in rows if row.planner.startswith("ours")}
    found = []
    for other in (row for row in rows if row.planner not in ours and row.fits):
        figures = (("balance", "kv_positions", 1), ("latency", "latency_s", -1), ("throughput", "bottleneck_s", -1))
        for objective, figure, sign in figures:
            mine = [sign * getattr(row, figure) for name, row in ours.items() if objective in name and row.fits]
            if not mine or sign * getattr(other, figure) > max(mine):
                found.append(f"{other.planner} in {figure}")
    return found


def main() -> int:
    """Write the table; exit 1 where a peer is better."""
    lines = [
        "# Peers",
        "",
        f"`python benchmarks/peers.py`; transformers {transformers.__version__}, accelerate {accelerate.__version__}. "
        "Every placement is scored by the planner's own evaluator, for 512 prompt tokens, one image where the model "
        "takes one, and 512 new tokens, in the catalogue's dtype: nothing here was measured on a GPU. transformers is "
        "given each card's whole memory, as it would find it.",
        "",
        "A note stands where a placement has no figures. `KV positions` are what `balance` maximises: how many fit "
        "beside the weights and this workload's activations. `request` is a whole answer of one stream, `bottleneck` "
        "the slowest stage of a full pipeline.",
        "",
    ]
    tables: list[str] = []
    answers: list[list[Row]] = []
    beaten: list[str] = []
    for name in dict.fromkeys(lookup(alias).name for alias in catalogue_names()):
        model = find_model(name)
        try:
            resolved = model.resolved(Workload())
            model.graph(resolved)
        except UnsupportedModelError:
            continue
        print(name, file=sys.stderr, flush=True)
        skeleton = build_skeleton(model, dtype=getattr(torch, resolved.dtype))
        for spec in MACHINES:
            rows = list(rows_for(model, skeleton, spec))
            beaten += [f"{name} on {spec}: {text}" for text in worse(rows)]
            answers.append(rows)
            tables += [f"## {name} on {spec}", "", *_table(rows), ""]
    verdict = "No peer is better on any row in the figure that an objective of ours optimises."
    lines += [verdict if not beaten else "Better than ours: " + "; ".join(beaten) + ".", ""]
    lines += [*_summary(answers), "", *tables]
    TABLE.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(beaten) or verdict, file=sys.stderr)
    return int(bool(beaten))


def _summary(answers: list[list[Row]]) -> Iterator[str]:
    """Per planner: how often its placement fits, and there its figures beside ours for the same model and machine."""
    yield f"Over {len(answers)} pairs of model and machine; shares are medians over those where both fit."
    yield ""
    titles = ("KV positions beside balance", "request beside latency", "bottleneck beside throughput")
    yield f"| planner | fits | {' | '.join(titles)} |"
    yield "|---|--:|--:|--:|--:|"
    for planner in dict.fromkeys(row.planner for rows in answers for row in rows):
        by_planner = [{row.planner: row for row in rows} for rows in answers]
        own = [(found[planner], found) for found in by_planner if planner in found and found[planner].fits]
        shares = []
        for figure, ours in (("kv_positions", "balance"), ("latency_s", "latency"), ("bottleneck_s", "throughput")):
            both = [(getattr(row, figure), found[f"ours, {ours}"]) for row, found in own if found[f"ours, {ours}"].fits]
            shares.append(median(value / getattr(best, figure) for value, best in both) if both else None)
        cells = " | ".join("-" if share is None else f"{share:.2f}" for share in shares)
        yield f"| {planner} | {len(own)} | {cells} |"


def _table(rows: list[Row]) -> Iterator[str]:
    yield "| planner | GPUs | KV positions | TPOT | request | bottleneck |"
    yield "|---|--:|--:|--:|--:|--:|"
    for row in rows:
        if row.note:
            yield f"| {row.planner} | {row.note} | | | | |"
            continue
        kv_positions = "-" if row.kv_positions is None else f"{row.kv_positions:,}"
        yield (
            f"| {row.planner} | {row.num_devices} | {kv_positions} | {(row.tpot_s or 0) * 1e3:.1f} ms "
            f"| {row.latency_s:.2f} s | {row.bottleneck_s:.2f} s |"
        )


if __name__ == "__main__":
    sys.exit(main())
