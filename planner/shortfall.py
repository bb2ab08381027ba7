"""Why nothing fits: what each device lacks in the nearest placement, which part binds, and changes that would fit.

Every piece of advice was found by solving again, so following it gives a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from planner.errors import InfeasibleError
from planner.machine import Device, Machine
from planner.memory import LABELS, CostTable, MemoryBreakdown
from planner.polynomial import Quantities
from planner.problem import Problem, Solution, evaluate
from planner.solve import chain_dp
from planner.units import format_bytes, shorthand

MAX_EXTRA_DEVICES = 8


def infeasible(problem: Problem, solution: Solution, tried: Iterable[str] = ()) -> InfeasibleError:
    """The error to raise for an INFEASIBLE solution, with shortfalls and advice as attributes.

    `tried` are changes that fit, found by who knows the model.
    """
    evaluation = evaluate(problem, solution.stages)
    short = {
        device.name: peak.total_bytes - device.memory_bytes
        for device, peak in zip(problem.machine.devices, evaluation.memory, strict=True)
        if peak.total_bytes > device.memory_bytes
    }
    pairs = zip(problem.machine.devices, evaluation.memory, strict=True)
    lines = [_device_line(device, peak) for device, peak in pairs if device.name in short]
    advice = tuple(dict.fromkeys((*tried, *_advice(problem))))
    lines += [
        f"Would fit: {'; or '.join(advice)}."
        if advice
        else f"No shorter context, smaller batch or one to {MAX_EXTRA_DEVICES} more devices of this size would fit."
    ]
    graph = problem.graph
    headline = (
        f"{graph.name} in {graph.dtype} does not fit: {format_bytes(sum(short.values()))} are missing on "
        f"{len(short)} of {len(problem.machine.devices)} devices in the nearest placement."
    )
    return InfeasibleError("\n".join([headline, *lines]), shortfall_bytes=short, advice=advice)


def _device_line(device: Device, peak: MemoryBreakdown) -> str:
    parts = {name: num_bytes for name, num_bytes in peak.parts.items() if num_bytes}
    listed = " + ".join(f"{format_bytes(num_bytes)} {LABELS[name]}" for name, num_bytes in parts.items())
    binding = max(parts, key=lambda name: parts[name])
    verb = "bind" if LABELS[binding].endswith("s") else "binds"
    return (
        f"{device.name} is short by {format_bytes(peak.total_bytes - device.memory_bytes)}: {listed} = "
        f"{format_bytes(peak.total_bytes)}, of {format_bytes(device.memory_bytes)}. The {LABELS[binding]} {verb}."
    )


def _advice(problem: Problem) -> Iterator[str]:
    yield from _shorter(problem)
    yield from _smaller_batch(problem)
    yield from _more_devices(problem)


def _shorter(problem: Problem) -> Iterator[str]:
    """The longest KV cache that fits, as far as the prompt and one new token allow."""
    asked = problem.quantities
    prompt = asked.text_tokens + asked.image_tokens
    longest = _largest(asked.positions, lambda n: _with(problem, replace(asked, positions=n)))
    if longest > prompt:
        yield f"--new-tokens {longest - prompt} (with --max-model-len {longest} or less)"


def _smaller_batch(problem: Problem) -> Iterator[str]:
    largest = _largest(problem.quantities.batch, lambda n: _with(problem, replace(problem.quantities, batch=n)))
    if largest:
        yield f"--batch-size {largest}"


def _more_devices(problem: Problem) -> Iterator[str]:
    machine = problem.machine
    largest = max(machine.devices, key=lambda device: device.memory_bytes)
    for count in range(1, MAX_EXTRA_DEVICES + 1):
        added = tuple(replace(largest, host="added", index=index, uuid=None) for index in range(count))
        if _fits(replace(problem, machine=Machine(devices=(*machine.devices, *added)))):
            kind = largest.kind or shorthand(largest.memory_bytes)
            yield f"{count} more {'device' if count == 1 else 'devices'} of {kind}"
            return


def _with(problem: Problem, quantities: Quantities) -> bool:
    table = CostTable.of(problem.graph, quantities)
    return _fits(replace(problem, quantities=quantities, table=table))


def _fits(problem: Problem) -> bool:
    return chain_dp.fits(problem)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `limit` that fits, or 0; fitting is downward closed."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
