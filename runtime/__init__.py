"""Knows devices, real and virtual: obeys a plan. Names resolve on first use, so that probing imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Pipeline": "runtime.pipeline.pipeline",
    "diagnose": "runtime.diagnosis.diagnosis",
    "dry_run": "runtime.proof",
    "inspect_placement": "runtime.inspection",
    "load_sharded": "runtime.load",
    "module_graph": "runtime.planning",
    "plan_model": "runtime.planning",
    "place_inputs": "runtime.load",
    "probe_machine": "runtime.probe",
    "shard": "runtime.in_memory",
}

__all__ = [
    "Pipeline",
    "diagnose",
    "dry_run",
    "inspect_placement",
    "load_sharded",
    "module_graph",
    "place_inputs",
    "plan_model",
    "probe_machine",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
