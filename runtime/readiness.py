"""Checked before a weight is read: the plan is this model's, and the devices have the memory that it counts on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from planner.errors import MachineError, PlanMismatchError, UnsupportedModelError
from planner.plan import DeviceKey, Plan
from planner.units import format_bytes
from runtime.planning import fingerprint
from vlm.model import Model
from vlm.stored_layouts import quantization_config
from vlm.traced import TracedModel

REPLAN = "Or give no plan, which plans anew (--replan)."


def refuse_other_model(plan: Plan, model: Model, skeleton: PreTrainedModel, what: str) -> None:
    """Raise PlanMismatchError when `plan` is not for `model`, whose modules are in `skeleton`.

    Plans made from a module carry the modules' fingerprint, those of written-down graphs the facts'.
    """
    found = fingerprint(skeleton)
    if found == plan.fingerprint:
        return
    try:
        plan.check_model(found if isinstance(model, TracedModel) else model.fingerprint, what)
    except PlanMismatchError as problem:
        raise PlanMismatchError(f"{problem} {REPLAN}") from problem


def refuse_full_devices(plan: Plan, places: Mapping[DeviceKey, torch.device]) -> None:
    """Raise MachineError when a GPU has less free memory now than its part of the plan takes.

    The context is there once torch has been asked, and the reserve is for what may come: neither is asked for.
    """
    needed: dict[torch.device, int] = {}
    for key, part in plan.memory.items():
        if key not in places:
            continue  # another process's
        device = places[key]
        used = part.total_bytes - part.context_bytes - part.reserve_bytes
        if device.type != "cpu" and key in set(plan.running.values()):
            needed[device] = needed.get(device, 0) + used
    short = []
    for device, num_bytes in needed.items():
        free_bytes, _ = torch.get_device_module(device).mem_get_info(device)
        if free_bytes < num_bytes:
            short.append(f"{device} has {format_bytes(free_bytes)} free, and the plan takes {format_bytes(num_bytes)}")
    if short:
        raise MachineError(f"{'; '.join(short)}. Free that memory, or make a plan for what is free. {REPLAN}")


def refuse_stored_quantised(model: Model) -> None:
    """Raise UnsupportedModelError where weights are stored in fewer bits: a stage of a pipeline reads them in full."""
    stored = quantization_config(model.config)
    if stored is not None:
        raise UnsupportedModelError(
            f"{model.name} is stored in {stored.get('quant_method', 'an unknown method')}, whose codes the loader "
            "checks against the layers of a whole model: load_sharded runs it in one process. Plain weights are "
            "quantised stage by stage: plan the unquantised checkpoint with --quantize"
        )
