"""A plan's proof: on file with the catalogue, in the cache, or from a run on virtual GPUs now."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from planner.cli import options
from planner.errors import ConstraintError, UnsupportedModelError
from planner.plan import Plan
from vlm.model import Model
from vlm.proofs import keep_proof, kept_proof, with_weights_named


def proven(model: Model, plan: Plan, console: Console, *, anew: bool = False) -> Plan:
    """The plan with its proof; where nothing can run it stays unproven, and the console says why.

    `anew` runs it whatever is on file. Raises: InfeasibleError when the run meets a mismatch; UnsupportedModelError
    when `anew` is asked for and nothing can run.
    """
    folder = options.cache_folder()
    if not anew:
        kept = dict(plan.proof) if plan.proof["status"] == "proven" else kept_proof(folder, plan)
        if kept:
            return with_weights_named(replace(plan, proof=kept))
    try:
        plan = _run(model, plan)
    except UnsupportedModelError as problem:
        if anew:
            raise
        console.print(f"Unproven: {problem}", markup=False)
        return plan
    keep_proof(folder, plan)
    return with_weights_named(plan)


def _run(model: Model, plan: Plan) -> Plan:
    """The plan, proven by a run. Raises: UnsupportedModelError where none is possible."""
    try:
        from runtime.proving import prove
        from runtime.quiet import quiet_libraries
        from runtime.virtual import VirtualGpuUnavailableError
    except ModuleNotFoundError as problem:
        raise UnsupportedModelError(
            f"a proof is a run, which needs {problem.name}: pip install 'plan-devices[torch]'"
        ) from problem
    try:
        with quiet_libraries():
            return prove(model, plan)
    except (VirtualGpuUnavailableError, ConstraintError) as problem:
        raise UnsupportedModelError(f"no run is possible here: {problem}") from problem
