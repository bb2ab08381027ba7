"""The proof of a plan for a model of ours: that model, at its full size and without its weights, runs as planned.

Prefill and decode steps of the plan's own workload run on virtual GPUs that have sizes and no bytes, under the hooks
that `load_sharded` uses and under accelerate's, which anyone else would use with the device map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

from planner.constraints import Constraints, units
from planner.errors import ConstraintError, InfeasibleError
from planner.machine import Machine
from planner.paths import collapse
from planner.plan import Plan
from planner.workload import Workload, workload_class
from runtime.proof import DryRun, Hooks, dry_run
from runtime.rehearsal import rehearsal
from vlm.model import Model
from vlm.proofs import proof_digest
from vlm.versions import installed_versions

HOOKS: tuple[Hooks, ...] = ("ours", "accelerate")


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
    proof = {
        "status": "proven",
        "hooks": ", ".join(HOOKS),
        "workload_class": covered,
        "versions": installed_versions(),
        "fingerprint": proof_digest(plan),
    }
    return replace(plan, proof=proof)


def rehearse(model: Model, plan: Plan, hooks: Hooks) -> DryRun:
    """The dry run of a plan's own workload at full size."""
    if len(plan.machine.hosts) > 1:
        raise ConstraintError(f"a plan over hosts {', '.join(plan.machine.hosts)} cannot be proven in one process")
    return _run(model, plan.workload, plan, hooks)


def rehearse_apart(model: Model, workload: Workload, hooks: Hooks) -> DryRun:
    """The dry run of the finest placement: every unit of the graph on a device of its own, the inputs on another.

    What meets here lies together in every placement that keeps the graph's hard fusions; one clean run therefore proves
    them all, for this kind of workload, under hooks that sit on the modules that a map lists.
    """
    resolved = model.resolved(workload)
    graph = model.graph(resolved)
    apart = units(graph, Machine.parse("1GiB"), Constraints(split_vision=True))
    device_map = {
        module: index for index, unit in enumerate(apart, 1) for i in unit.members for module in graph.groups[i].modules
    }
    at_home = graph.home.modules if graph.home else ()
    return _run(model, resolved, device_map | dict.fromkeys(at_home, 0), hooks, home=0)


def rehearse_cuts(model: Model, workload: Workload, hooks: Hooks) -> Iterator[DryRun]:
    """Dry runs of the model cut in two wherever its parts meet, either part first, with each map in its shortest form.

    Plans list a whole part by its name alone, and accelerate hooks what is listed: a model that calls a method of a
    part instead of the part itself is found here, and not with everything apart.
    """
    resolved = model.resolved(workload)
    graph = model.graph(resolved)
    groups = graph.groups
    at_home = set(graph.home.modules if graph.home else ())
    parts = [group.module_list or group.modules[0].rpartition(".")[0] for group in groups]
    cuts = [i for i in range(1, len(groups)) if parts[i] != parts[i - 1]]
    for cut, first in product(cuts, (0, 1)):
        device_of = {group.id: first if i < cut else 1 - first for i, group in enumerate(groups)}
        device_of |= {group.id: 0 for group in groups if at_home.intersection(group.modules)}
        device_map = collapse({module: device_of[group.id] for group in groups for module in group.modules})
        yield _run(model, resolved, device_map, hooks, home=0)


def _run(
    model: Model, workload: Workload, placement: Plan | Mapping[str, int], hooks: Hooks, home: int | None = None
) -> DryRun:
    run = rehearsal(model, workload)
    return dry_run(run.skeleton, run.inputs, placement, hooks=hooks, steps=run.steps, home=home)
