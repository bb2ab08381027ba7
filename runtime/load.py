"""`load_sharded`: from a checkpoint and a plan to a model on its devices, each weight read once.

A weight goes from its shard straight to the device the plan names; a failure frees every device.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from planner.errors import ConstraintError, MachineError, SourceError
from planner.machine import Machine
from planner.plan import DeviceKey, Plan
from planner.workload import Workload
from runtime.boundary import attach_boundaries, refuse_moves
from runtime.devices import Devices, torch_devices
from runtime.first_forward import watch_first_forward
from runtime.inspection import verify_placement
from runtime.links import Links
from runtime.offload import attach_offload
from runtime.overflow import report_overflow
from runtime.probe import probe_machine
from runtime.progress import byte_bar
from runtime.quantised import let_weights_go, quantiser_for
from runtime.readiness import refuse_full_devices, refuse_other_model
from runtime.sources import local_checkpoint, model_to_load, stored_weights
from runtime.ties import keep_copies
from runtime.weights import load_weights
from vlm.checkpoint import Checkpoint
from vlm.hub import Hub
from vlm.model import Model
from vlm.planning import plan_for
from vlm.skeleton import build_skeleton
from vlm.stored_layouts import quantization_config


def load_sharded(
    source: str | Path | Model,
    plan: Plan | str | Path | None = None,
    *,
    machine: Machine | None = None,
    workload: Workload | None = None,
    devices: Devices = None,
    verify: bool = False,
    hub: Hub | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in `source`, placed as `plan` says, ready to `generate`.

    `source` is a checkpoint folder, a hub id, or a model that `find_model` found; `hub` says how to reach the hub.
    `trust_remote_code` runs the code that a checkpoint brings, where transformers has no class for it.
    Without a plan one is made for `machine`, or for the GPUs found here. `devices` is None for real GPUs, "virtual"
    for virtual ones, "cpu", or a list with one device for each of the plan's. `verify` compares every module's device
    with the plan and watches the first forward: what modules are given, and what meets between them (`.merges`). The
    model carries its plan as `.plan`, the price of what rests on the host as `.offload`, where each input belongs as
    `.input_devices`, and which links between GPUs were tested as `.links`.

    Raises: SourceError for a checkpoint that cannot be read; PlanMismatchError for another model's plan; MachineError
    when the devices are not there or too full; torch.OutOfMemoryError when one fills up. Whatever was placed is freed
    then.
    """
    hub = replace(hub or Hub(), with_code=True) if trust_remote_code else hub or Hub()
    model = model_to_load(source, hub)
    stored = stored_weights(model)
    quantised = quantization_config(model.config)
    plan = _plan(model, plan, machine, workload, devices)
    dtype = getattr(torch, plan.workload.dtype)
    skeleton = build_skeleton(model, dtype=dtype, attention=plan.workload.attention)
    refuse_other_model(plan, model, skeleton, str(stored.folder))
    places = torch_devices(plan, devices)
    refuse_full_devices(plan, places)
    device_map = {name: places[key] for name, key in plan.device_map.items()}
    quantiser = quantiser_for(skeleton, plan, quantised, device_map)
    checkpoint = local_checkpoint(stored, hub)  # a refusal before this costs no download
    if skeleton.can_generate():
        skeleton.generation_config = generation_config_of(checkpoint.folder, skeleton)
    try:
        with byte_bar("Loading weights", _stored_bytes(checkpoint)) as advance:
            load_weights(skeleton, checkpoint, device_map, advance, quantiser)
        if plan.workload.replicate_tied:
            keep_copies(skeleton, device_map)
        return _attached(skeleton, plan, places, device_map, verify=verify)
    except BaseException as problem:
        # The exception's frames hold the skeleton and weights on their way: let all of it go, so that every device is
        # free when the caller sees the exception.
        let_weights_go(skeleton)
        traceback.clear_frames(problem.__traceback__)
        raise


def place_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's output with every tensor on the device that consumes it first.

    `model.device` is a vision parameter's device in most VLMs, and no place for `input_ids`.
    """
    devices = model.input_devices
    home = devices["input_ids"]
    return {
        name: value.to(devices.get(name, home)) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def _attached(
    skeleton: PreTrainedModel,
    plan: Plan,
    places: Mapping[DeviceKey, torch.device],
    device_map: Mapping[str, torch.device],
    *,
    verify: bool,
) -> PreTrainedModel:
    home = places[plan.input_devices["input_ids"]]
    running = {name: places[key] for name, key in plan.running.items()}
    skeleton.links = Links()
    skeleton.offload = attach_offload(skeleton, device_map, running)
    attach_boundaries(skeleton, running, home, skeleton.links)
    refuse_moves(skeleton)
    if skeleton.dtype == torch.float16:
        report_overflow(skeleton)
    skeleton.plan = plan
    skeleton.hf_device_map = dict(device_map)
    skeleton.input_devices = {name: places[key] for name, key in plan.input_devices.items()}
    if verify:
        verify_placement(skeleton)
        watch_first_forward(skeleton)
    return skeleton


def _plan(
    model: Model, plan: Plan | str | Path | None, machine: Machine | None, workload: Workload | None, devices: Devices
) -> Plan:
    if plan is not None:
        if machine is not None or workload is not None:
            raise ConstraintError("a plan already says machine and workload: give either a plan, or what to plan with")
        return plan if isinstance(plan, Plan) else Plan.load(plan)
    if machine is None:
        if devices is not None:
            raise MachineError(f"devices={devices!r} needs a plan or a machine, such as Machine.parse('2x24GiB')")
        machine = probe_machine()
    return plan_for(model, machine, workload)


def _stored_bytes(checkpoint: Checkpoint) -> int:
    return sum(path.stat().st_size for path in checkpoint.pickles or checkpoint.shards)


def generation_config_of(folder: Path, skeleton: PreTrainedModel) -> GenerationConfig:
    """The folder's, else what the config says, without its `max_length`: that argues with every `max_new_tokens`."""
    if (folder / "generation_config.json").exists():
        try:
            return GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as problem:
            raise SourceError(f"{folder / 'generation_config.json'} cannot be used: {problem}") from problem
    made = skeleton.generation_config
    made.max_length = None
    return made
