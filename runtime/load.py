"""`load_sharded`: from a checkpoint folder and a plan to a model on its devices, each weight read once.

A weight goes from its shard straight to the device the plan names; a failure frees every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from planner.errors import ConstraintError, MachineError, PlanMismatchError, SourceError
from planner.machine import Machine
from planner.paths import owner
from planner.plan import DeviceKey, Plan
from planner.workload import Workload
from runtime.boundary import attach_boundaries
from runtime.devices import Devices, refuse_uncovered, torch_devices
from runtime.inspection import guard_first_forward, verify_placement
from runtime.probe import probe_machine
from vlm.checkpoint import TensorHeader
from vlm.model import OPTIONAL_WEIGHTS, Model, find_model
from vlm.planning import plan_for
from vlm.skeleton import build_skeleton


def load_sharded(
    source: str | Path,
    plan: Plan | str | Path | None = None,
    *,
    machine: Machine | None = None,
    workload: Workload | None = None,
    devices: Devices = None,
    verify: bool = False,
) -> PreTrainedModel:
    """The model in the folder `source`, placed as `plan` says, ready to `generate`.

    Without a plan one is made for `machine`, or for the GPUs found here. `devices` is None for real GPUs, "virtual"
    for virtual ones, "cpu", or a list with one device for each of the plan's. `verify` compares every module's device
    with the plan and watches the first forward. The model carries its plan as `.plan`, and where each input belongs
    as `.input_devices`.

    Raises: SourceError for a folder that cannot be read; PlanMismatchError for another model's plan; MachineError
    when the devices are not there; torch.OutOfMemoryError when one is full. Whatever was placed is freed then.
    """
    model = find_model(str(source))
    if model.checkpoint is None:
        raise SourceError(f"{source} is a name in the catalogue: loading needs a folder that holds its weights")
    plan = _plan(model, plan, machine, workload, devices)
    plan.check_model(model.fingerprint, str(source))
    places = torch_devices(plan, devices)
    dtype = getattr(torch, plan.workload.dtype)
    skeleton = build_skeleton(model, dtype=dtype, attention=plan.workload.attention)
    skeleton.generation_config = _generation_config(model.checkpoint.folder, skeleton)
    device_map = {name: places[key] for name, key in plan.device_map.items()}
    try:
        place_weights(skeleton, _weights(model.checkpoint.tensors), device_map)
        return _attached(skeleton, plan, places, device_map, verify=verify)
    except BaseException:
        # The exception's frames hold the skeleton: empty it, so that every device is free when the caller sees it.
        skeleton.to("meta")
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


def place_weights(
    skeleton: nn.Module, weights: Iterator[tuple[str, torch.Tensor]], device_map: Mapping[str, torch.device]
) -> None:
    """Fill `skeleton` with `weights`, each cast to its parameter's dtype on its way to its device; then the buffers.

    Raises: PlanMismatchError when the map leaves a weight or buffer without a device.
    """
    refuse_uncovered(skeleton, device_map)
    names_of = _names_by_parameter(skeleton)
    for name, weight in weights:
        module, leaf = _parent(skeleton, name)
        expected = module._parameters.get(leaf)
        if expected is None:
            continue
        placed = weight.to(device=device_map[_key(name, device_map)], dtype=expected.dtype)
        parameter = nn.Parameter(placed, requires_grad=False)
        for tied in names_of[id(expected)]:
            module, leaf = _parent(skeleton, tied)
            module._parameters[leaf] = parameter
    _initialise_optional(skeleton, device_map)
    for name, buffer in list(skeleton.named_buffers()):
        module, leaf = _parent(skeleton, name)
        module._buffers[leaf] = buffer.to(device_map[_key(name, device_map)])


def _names_by_parameter(skeleton: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter: tied modules share one."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _attached(
    skeleton: PreTrainedModel,
    plan: Plan,
    places: Mapping[DeviceKey, torch.device],
    device_map: Mapping[str, torch.device],
    *,
    verify: bool,
) -> PreTrainedModel:
    home = places[plan.input_devices["input_ids"]]
    attach_boundaries(skeleton, device_map, home)
    skeleton.plan = plan
    skeleton.hf_device_map = dict(device_map)
    skeleton.input_devices = {name: places[key] for name, key in plan.input_devices.items()}
    if verify:
        verify_placement(skeleton)
        guard_first_forward(skeleton)
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


def _weights(headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every stored weight, shard by shard, one in memory at a time."""
    by_shard: dict[Path, list[str]] = {}
    for name, header in headers.items():
        by_shard.setdefault(header.shard, []).append(name)
    for shard, names in by_shard.items():
        with safe_open(shard, framework="pt", device="cpu") as weights:
            for name in names:
                yield name, weights.get_tensor(name)


def _generation_config(folder: Path, skeleton: PreTrainedModel) -> GenerationConfig:
    """The folder's, else what the config says, without its `max_length`: that argues with every `max_new_tokens`."""
    if (folder / "generation_config.json").exists():
        try:
            return GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as problem:
            raise SourceError(f"{folder / 'generation_config.json'} cannot be used: {problem}") from problem
    config = skeleton.config
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _initialise_optional(skeleton: nn.Module, device_map: Mapping[str, torch.device]) -> None:
    """Weights that some checkpoints leave out because nothing reads them: a norm's neutral values."""
    missing = [name for name, parameter in skeleton.named_parameters() if parameter.is_meta]
    unexplained = [name for name in missing if name not in OPTIONAL_WEIGHTS]
    if unexplained:
        raise PlanMismatchError(f"the checkpoint gave no value for {', '.join(unexplained[:3])}: it is incomplete")
    for name in missing:
        module, leaf = _parent(skeleton, name)
        shape, dtype = module._parameters[leaf].shape, module._parameters[leaf].dtype
        value = torch.ones(shape, dtype=dtype) if leaf == "weight" else torch.zeros(shape, dtype=dtype)
        module._parameters[leaf] = nn.Parameter(value.to(device_map[_key(name, device_map)]), requires_grad=False)


def _key(name: str, device_map: Mapping[str, torch.device]) -> str:
    found = owner(name, device_map)
    assert found is not None, name
    return found


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
