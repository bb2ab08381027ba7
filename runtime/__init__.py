"""Knows devices, real and virtual: obeys a plan. Names resolve on first use, so that probing imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "inspect_placement": "runtime.inspection",
    "load_sharded": "runtime.load",
    "place_inputs": "runtime.load",
    "probe_machine": "runtime.probe",
}

__all__ = ["inspect_placement", "load_sharded", "place_inputs", "probe_machine"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
