"""Risks of a device map that no run shows: its spelling, its order, who launched it, which GPUs copy to which.

Pure: the environment and the machine come in as data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from planner.diagnosis.diagnosis import Crossing, Finding
from planner.diagnosis.map_file import GivenMap
from planner.machine import Machine
from planner.units import format_bytes

LAUNCHER_VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "RANK")
"""What torchrun and accelerate launch set for each of their processes."""


def main_device(given: GivenMap) -> int:
    """The GPU that accelerate brings inputs and results to: the first of a *set* of the map's values.

    For integers that order is Python's own and the same in every run; for text it is not, and this is the first that
    the map names.
    """
    values = [value for value in given.written.values() if str(value) not in ("cpu", "disk")]
    if not values:
        return 0
    if all(isinstance(value, int) for value in values):
        return int(next(iter(set(values))))
    return given.gpus[0]


def has_stable_order(given: GivenMap) -> bool:
    """Whether the main device is the same in every process: the hash of text is not."""
    values = {value for value in given.written.values() if str(value) not in ("cpu", "disk")}
    return len(values) < 2 or all(isinstance(value, int) for value in values)


def spelling_findings(given: GivenMap) -> Iterator[Finding]:
    """Devices written in two ways, and as digits in quotes."""
    written = [value for value in given.written.values() if str(value) not in ("cpu", "disk")]
    numbers = [value for value in written if isinstance(value, int)]
    texts = [str(value) for value in written if not isinstance(value, int)]
    quoted = sorted({text for text in texts if text.isdigit()})
    if quoted:
        yield Finding(
            severity="will fail",
            hazard="genio",
            title=f"devices are digits in quotes: {', '.join(map(repr, quoted))}",
            evidence=("torch reads a text as a device's type: RuntimeError, Invalid device string",),
            fix="Write indices as integers. JSON keeps them, as does YAML without quotes.",
        )
    if numbers and len(texts) > len(quoted):
        yield Finding(
            severity="wasteful",
            hazard="genio",
            title=f"devices are integers and text: {numbers[0]} and {next(t for t in texts if t not in quoted)!r}",
            evidence=("accelerate takes 0 and 'cuda:0' for two devices, and picks its main device from a set of both",),
            fix="Write all of them as integers.",
        )


def order_findings(given: GivenMap, home: int) -> Iterator[Finding]:
    """A main device that follows from the order of a set."""
    indices = sorted(given.gpus)
    if len(indices) < 2:
        return
    if not has_stable_order(given):
        yield Finding(
            severity="wasteful",
            hazard="genio",
            title="where inputs and results go changes from one process to the next",
            evidence=(
                "accelerate brings them to the first of a set of the map's devices; these are text, and Python orders "
                "a set of text anew in every process",
            ),
            fix="Write devices as integers: a set of small integers has one order.",
        )
    elif home != indices[0]:
        yield Finding(
            severity="wasteful",
            hazard="genio",
            title=f"inputs and results go to cuda:{home}, not to cuda:{indices[0]}",
            evidence=(f"accelerate takes the first of the set {{{', '.join(map(str, indices))}}}, which is {home}",),
            fix="Use indices that start at 0, or pass main_device to dispatch_model.",
        )


def launcher_findings(given: GivenMap, environment: Mapping[str, str]) -> Iterator[Finding]:
    """A map that spans GPUs in each of several processes."""
    world = environment.get("WORLD_SIZE", "")
    if len(given.gpus) < 2 or not world.isdecimal() or int(world) < 2:
        return
    found = [f"{name}={environment[name]}" for name in LAUNCHER_VARIABLES if name in environment]
    yield Finding(
        severity="will fail",
        hazard="launcher",
        title=f"{world} processes would each load the model onto GPUs {', '.join(map(str, sorted(given.gpus)))}",
        evidence=(", ".join(found), "every process sees every GPU, so the copies share their memory"),
        fix='Start one process without the launcher, or give each its own GPU: device_map={"": LOCAL_RANK}.',
    )


def peer_findings(machine: Machine, crossings: Sequence[Crossing]) -> Iterator[Finding]:
    """Pairs of GPUs that exchange tensors over a link that is not allowed, or, where links are known, over none."""
    if not machine.links:
        return
    allowed = {(link.source, link.target): link.allowed for link in machine.links}
    pairs: dict[tuple[str, str], int] = {}
    for crossing in crossings:
        pair = crossing.source, crossing.target
        pairs[pair] = pairs.get(pair, 0) + crossing.num_bytes
    for (source, target), num_bytes in pairs.items():
        if allowed.get((source, target)):
            continue
        is_forbidden = (source, target) in allowed
        yield Finding(
            severity="may fail" if is_forbidden else "wasteful",
            hazard="p2p",
            title=f"{source} -> {target} {'is a link that is not allowed' if is_forbidden else 'has no direct link'}",
            evidence=(f"{format_bytes(num_bytes)} of copies per prompt and token go that way",),
            fix="Let neighbouring stages be on linked GPUs. Check a copy before trusting one: some drivers grant "
            "peer access and deliver wrong data.",
        )


def offload_findings(given: GivenMap, num_bytes: int) -> Iterator[Finding]:
    """Weights that are brought to a GPU for every pass, or a map without one; `num_bytes` are theirs together."""
    where = " and ".join(sorted({str(place) for place in given.offloaded.values()}))
    if not given.gpus:
        yield Finding(
            severity="wasteful",
            hazard="offload",
            title=f"no GPU is used: everything stays on {where}",
            evidence=("accelerate then takes the CPU for its main device, and runs the model there",),
            fix="Give modules the index of a GPU.",
            modules=tuple(given.offloaded),
        )
    elif given.offloaded and num_bytes:
        yield Finding(
            severity="wasteful",
            hazard="offload",
            title=f"{format_bytes(num_bytes)} of weights stay on {where}",
            evidence=(
                "every pass copies them to a GPU and drops them again, so each new token waits for all of them",
                ", ".join(list(given.offloaded)[:4]) + (" ..." if len(given.offloaded) > 4 else ""),
            ),
            fix="Place them on GPUs, quantise the language layers, or add a GPU.",
            modules=tuple(given.offloaded),
        )
