"""What of an estimate rests on a default, where a measurement on the machine would say more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from planner.machine import CONTEXT_BYTES, Device
from planner.plan import Plan, device_key
from planner.timing import BANDWIDTH_FRACTION, FLOPS_FRACTION, LAUNCH_S
from planner.units import format_bytes

BETWEEN_GPUS = "PCI Express 3.0 x16 between GPUs"
BETWEEN_HOSTS = "10 Gbit/s between hosts"
TO_THE_HOST = "PCI Express 3.0 x16 to the host"


def defaults_of(plan: Plan) -> Iterator[str]:
    """The defaults, in words: a context that was not measured, shares of datasheet rates, links that are not named."""
    used = {key for key, peak in plan.memory.items() if peak.total_bytes}
    devices = [d for p, d in enumerate(plan.machine.devices) if device_key(plan.machine, p) in used]
    yield from context_default(devices)
    if plan.offload is not None and not all(device.host_bandwidth_bytes_per_s for device in devices):
        yield TO_THE_HOST
    if plan.estimate.tpot_s is not None:
        yield from rate_defaults(devices)
        yield from _links(plan)


def context_default(devices: Iterable[Device]) -> Iterator[str]:
    """The context, where nobody said how large it is on one of these devices."""
    if not all(device.context_given for device in devices):
        yield f"{format_bytes(CONTEXT_BYTES)} of CUDA context a GPU"


def rate_defaults(devices: Iterable[Device]) -> Iterator[str]:
    """What times on these devices rest on: the price of a kernel, and shares of the datasheet's rates."""
    devices = tuple(devices)
    if any(device.launch_s is None for device in devices):
        yield f"{LAUNCH_S * 1e6:.0f} us a kernel"
    if any(device.bandwidth_fraction is None for device in devices):
        yield f"{BANDWIDTH_FRACTION:.0%} of bandwidth"
    if any(device.flops_fraction is None for device in devices):
        yield f"{FLOPS_FRACTION:.0%} of FLOP/s"


def rests_on(defaults: Iterable[str]) -> str:
    """The sentence that names defaults; empty without any."""
    named = ", ".join(defaults)
    return f"Rests on defaults: {named}." if named else ""


def _links(plan: Plan) -> Iterator[str]:
    named = {(link.source, link.target) for link in plan.machine.links}
    by_key = {device_key(plan.machine, position): device for position, device in enumerate(plan.machine.devices)}
    crossed: list[tuple[Device, Device]] = [(by_key[one.source], by_key[one.target]) for one in plan.boundaries]
    unnamed = [ends for ends in crossed if (ends[0].name, ends[1].name) not in named]
    if any(source.host == target.host for source, target in unnamed):
        yield BETWEEN_GPUS
    if any(source.host != target.host for source, target in unnamed):
        yield BETWEEN_HOSTS
