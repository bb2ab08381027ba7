"""The proof of a plan for a model of ours: that model, at its full size and without its weights, runs as planned.

Prefill and decode steps of the plan's own workload run on virtual GPUs that have sizes and no bytes, under the hooks
that `load_sharded` uses and under accelerate's, which anyone else would use with the device map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import accelerate
import torch
import transformers
from torch import nn

from planner.constraints import Constraints, units
from planner.errors import ConstraintError, InfeasibleError
from planner.machine import Machine
from planner.plan import Plan
from planner.workload import Workload, workload_class
from runtime.proof import DryRun, Hooks, dry_run
from runtime.steps import Watch
from vlm.internlm_xcomposer2.workload_inputs import workload_inputs
from vlm.model import Model
from vlm.skeleton import build_skeleton

HOOKS: tuple[Hooks, ...] = ("ours", "accelerate")
NUM_DECODE_STEPS = 2


def prove(model: Model, plan: Plan) -> Plan:
    """`plan` with its proof filled in.

    Raises: InfeasibleError with the first mismatch when the plan does not run; ConstraintError for several hosts, which
    no single process can run.
    """
    for hooks in HOOKS:
        run = rehearse(model, plan, hooks)
        if not run.ok:
            raise InfeasibleError(f"the plan does not run under the hooks {hooks!r}: {run.mismatches[0]}")
    covered = workload_class(plan.workload)
    question = [plan.fingerprint, plan.device_map, covered, installed_versions()]
    proof = {
        "status": "proven",
        "hooks": ", ".join(HOOKS),
        "workload_class": covered,
        "versions": installed_versions(),
        "fingerprint": hashlib.sha256(repr(question).encode()).hexdigest()[:16],
    }
    return replace(plan, proof=proof)


def rehearse(model: Model, plan: Plan, hooks: Hooks) -> DryRun:
    """The dry run of a plan's own workload at full size."""
    if len(plan.machine.hosts) > 1:
        raise ConstraintError(f"a plan over hosts {', '.join(plan.machine.hosts)} cannot be proven in one process")
    return _run(model, plan.workload, plan, hooks)


def _prefill_and_decode(model: nn.Module, inputs: Mapping[str, Any], watch: Watch) -> list[Any]:
    """As `generate` does it: logits of the last position, the cache grown by one token a step."""
    outputs = model(**inputs, use_cache=True, logits_to_keep=1)
    results, mask = [outputs.logits], inputs["attention_mask"]
    watch.phase = "decode"
    for _ in range(NUM_DECODE_STEPS):
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
        outputs = model(
            input_ids=inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=outputs.past_key_values
        )
        results.append(outputs.logits)
    return results


def installed_versions() -> str:
    """What a proof was made with."""
    torch_version = torch.__version__.partition("+")[0]
    return f"torch {torch_version}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"


def rehearse_apart(model: Model, workload: Workload, hooks: Hooks) -> DryRun:
    """The dry run of the finest placement: every unit of the graph on a device of its own, the inputs on another.

    What meets here lies together in every placement that keeps the graph's hard fusions; one clean run therefore proves
    them all, for this kind of workload.
    """
    resolved = model.resolved(workload)
    graph = model.graph(resolved)
    apart = units(graph, Machine.parse("1GiB"), Constraints(split_vision=True))
    device_map = {
        module: index for index, unit in enumerate(apart) for i in unit.members for module in graph.groups[i].modules
    }
    return _run(model, resolved, device_map, hooks, home=len(apart))


def _run(
    model: Model, workload: Workload, placement: Plan | Mapping[str, int], hooks: Hooks, home: int | None = None
) -> DryRun:
    skeleton = build_skeleton(model, dtype=getattr(torch, workload.dtype), attention=workload.attention)
    inputs = workload_inputs(skeleton.config, workload)
    return dry_run(skeleton, inputs, placement, hooks=hooks, steps=_prefill_and_decode, home=home)
