"""What bounds prefill and decode on one kind of device: arithmetic, memory bandwidth, or kernel launches.

Sums of the roofline of planner/timing.py over all groups, as if they ran one after another on such devices; copies
between devices are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from planner.defaults import rate_defaults
from planner.errors import ConstraintError
from planner.graph import ModuleGraph, ModuleGroup, Phase, PhaseCost
from planner.machine import Device, describe
from planner.polynomial import Quantities, constant
from planner.timing import Roofline, at_average_length, roofline
from planner.workload import ITEMSIZE

Bound = Literal["compute", "bandwidth", "launches"]

GROUP_SIZE = 128
"""Weights that share a scale and a zero point: what published GPTQ and AWQ checkpoints use."""

SCALE_BITS = 16
HALF_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBound:
    """One pass through the whole model. Arithmetic and reading overlap within a group; launches come on top."""

    flops: int
    read_bytes: int
    launches: int
    compute_s: float
    read_s: float
    launch_s: float
    total_s: float
    bound: Bound

    @property
    def flops_per_byte(self) -> float:
        """Arithmetic intensity."""
        return self.flops / max(self.read_bytes, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedDecode:
    """Seconds of a decode step with the decoder layers in 4 bits, the cache and all else in 16.

    `fused_s` is that of kernels that read 4 bits and unpack in registers; `unpacked_s` that of writing every weight to
    memory in 16 bits before its product, without the launches that this adds.
    """

    fused_s: float
    unpacked_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBounds:
    """The bounds on one kind of device. `ridge_flops_per_byte` is where bandwidth stops and arithmetic starts to bind.

    `fits_weights` says whether one such device could hold all weights in the graph's dtype; `defaults` are what the
    seconds rest on.
    """

    device: str
    ridge_flops_per_byte: float
    fits_weights: bool
    prefill: PhaseBound
    decode: PhaseBound
    int4_decode: QuantisedDecode | None
    defaults: tuple[str, ...] = ()


def device_bounds(graph: ModuleGraph, device: Device, quantities: Quantities, new_tokens: int) -> DeviceBounds:
    """What bounds a request on devices like this; prefill includes the vision encoder's pass.

    `int4_decode` is None for a graph in another dtype than 16 bits, or with weights in fewer.
    Raises: ConstraintError for a device of unknown speed.
    """
    if not device.bandwidth_bytes_per_s or not device.flops_per_s:
        raise ConstraintError(
            f"{describe(device)} has no speed, so nothing says what bounds it: name a GPU model, such as "
            "--gpus rtx4090, or give bandwidth and flops in a machine file"
        )
    step = at_average_length(quantities, new_tokens)
    usable = device.memory_bytes - device.context_bytes - device.reserve_bytes
    return DeviceBounds(
        device=device.kind or device.name,
        ridge_flops_per_byte=device.flops_per_s / device.bandwidth_bytes_per_s,
        fits_weights=graph.weight_bytes <= usable,
        prefill=_phase_bound(graph, ("encode", "prefill"), quantities, device),
        decode=_phase_bound(graph, ("decode",), step, device),
        int4_decode=_int4_decode(graph, step, device) if _is_all_half(graph) else None,
        defaults=tuple(rate_defaults([device])),
    )


def quantised_bytes(num_parameters: int, bits: int) -> int:
    """Bytes of weights of `bits`, each group of `GROUP_SIZE` with a 16-bit scale and a zero point of as many bits."""
    return ceil(num_parameters * bits / 8) + ceil(num_parameters / GROUP_SIZE) * (SCALE_BITS + bits) // 8


def _is_all_half(graph: ModuleGraph) -> bool:
    return ITEMSIZE[graph.dtype] == HALF_BYTES and graph.plain is None


def _phase_bound(graph: ModuleGraph, phases: tuple[Phase, ...], quantities: Quantities, device: Device) -> PhaseBound:
    costs = [cost for group in graph for phase in phases if (cost := group.cost(phase)) is not None]
    needs = [_needs(cost, quantities, device) for cost in costs]
    parts: dict[Bound, float] = {
        "compute": sum(need.compute_s for need in needs),
        "bandwidth": sum(need.read_s for need in needs),
        "launches": sum(need.launch_s for need in needs),
    }
    return PhaseBound(
        flops=sum(cost.flops(quantities) for cost in costs),
        read_bytes=sum(cost.moved_bytes(quantities) for cost in costs),
        launches=sum(cost.launches(quantities) for cost in costs),
        compute_s=parts["compute"],
        read_s=parts["bandwidth"],
        launch_s=parts["launches"],
        total_s=sum(need.total_s for need in needs),
        bound=max(parts, key=lambda name: parts[name]),
    )


def _int4_decode(graph: ModuleGraph, step: Quantities, device: Device) -> QuantisedDecode:
    """A weight read in 16 bits is, fused, read in 4; unpacked, it is read in 4 and written before it is read in 16."""
    share = quantised_bytes(GROUP_SIZE, 4) / (GROUP_SIZE * HALF_BYTES)
    lists = graph.cached_lists

    def total_s(change: Callable[[int], int]) -> float:
        seconds = 0.0
        for group in graph:
            if group.decode is not None:
                read = _weights_read(group, group.decode, step) if group.module_list in lists else 0
                seconds += _needs(_with_reading(group.decode, step, change(read)), step, device).total_s
        return seconds

    return QuantisedDecode(
        fused_s=total_s(lambda read: round(read * share) - read),
        unpacked_s=total_s(lambda read: round(read * share) + read),
    )


def _weights_read(group: ModuleGroup, decode: PhaseCost, step: Quantities) -> int:
    """Bytes of weights that a decode step reads in a layer, with no cache: of a mixture of experts fewer than all."""
    return max(0, min(group.weight_bytes, decode.moved_bytes(replace(step, positions=0))))


def _with_reading(cost: PhaseCost, quantities: Quantities, more_bytes: int) -> PhaseCost:
    return PhaseCost(
        flops=cost.flops, read_bytes=constant(cost.moved_bytes(quantities) + more_bytes), launches=cost.launches
    )


def _needs(cost: PhaseCost, quantities: Quantities, device: Device) -> Roofline:
    needs = roofline(cost, quantities, device)
    assert needs is not None, "a device of unknown speed was refused"
    return needs
