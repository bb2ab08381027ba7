"""Pure planning: the values that everyone shares, and the reasoning on them. Imports no torch and no transformers."""

from planner.errors import (
    ConstraintError,
    InfeasibleError,
    MachineError,
    NoClassError,
    PlanMismatchError,
    PlannerError,
    SourceError,
    UnsupportedModelError,
)
from planner.graph import ModuleGraph
from planner.machine import Machine
from planner.plan import Plan
from planner.workload import Workload

__all__ = [
    "ConstraintError",
    "InfeasibleError",
    "Machine",
    "MachineError",
    "ModuleGraph",
    "NoClassError",
    "Plan",
    "PlanMismatchError",
    "PlannerError",
    "SourceError",
    "UnsupportedModelError",
    "Workload",
]
