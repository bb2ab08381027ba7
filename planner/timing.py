"""Seconds: of a group on a device, of a tensor on a link, and from both of any placement.

A roofline with a price per kernel. Decode is priced at the average cache length of the answer, so that one figure per
token times the number of tokens is the whole answer. A device of unknown speed has no seconds, and neither has a
placement that uses it. Counted in whole nanoseconds, so that sums have no rounding and equal placements equal times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from planner.graph import INPUTS, Flow, ModuleGraph, PhaseCost
from planner.machine import Device, Link, Machine
from planner.polynomial import Polynomial, Quantities

BANDWIDTH_FRACTION = 0.75
"""Share of a device's memory bandwidth that decode reaches: A100 76-79 %, L4 79-83 %, V100 66-83 %, T4 71-75 %.

Source: the per-layer profiles that Helix (ASPLOS 2025) publishes, batch 2.
"""

FLOPS_FRACTION = 0.68
"""Share of a device's 16-bit rate that prefill of 1000 tokens reaches: A100 69 %, V100 71-72 %; same source.

Cards held back by their power limit reach less (T4 40-45 %, L4 37 %): gpus.yaml says so for each.
"""

LAUNCH_S = 13e-6
"""Seconds per kernel of eager PyTorch beside the work itself.

Source: Qwen-7B in bfloat16 makes 40.93 tokens a second on an A100 80G (its README): 24.4 ms, of which 14.2 GB of
weights at 0.75 of 2039 GB/s are 9.3 ms; what is left, over 32 layers of the 35 kernels that a decoder layer has here.
"""

PCIE_BYTES_PER_S = 8e9 * 16 * 128 / 130 / 8
"""PCI Express 3.0 x16, from its specification: what two devices of one host have when the machine names no link."""

NETWORK_BYTES_PER_S = 10e9 / 8
"""10 Gbit/s Ethernet: assumed between hosts when the machine names no link."""

COPY_LATENCY_S = 2 * LAUNCH_S
"""A copy is issued on one side and waited for on the other."""

NETWORK_LATENCY_S = 100e-6
"""Assumed: a small message over TCP and back."""

NS_PER_S = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Nanoseconds until the first token, and per further token."""

    first_ns: int = 0
    token_ns: int = 0

    def __add__(self, other: Times) -> Times:
        return Times(first_ns=self.first_ns + other.first_ns, token_ns=self.token_ns + other.token_ns)

    def request_ns(self, new_tokens: int) -> int:
        """A whole request of so many new tokens."""
        return self.first_ns + new_tokens * self.token_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSize:
    """A flow's ends as group positions, None for the caller's side, and its bytes; once a request or once a token."""

    producer: int | None
    consumers: tuple[int | None, ...]
    num_bytes: int
    per_token: bool

    def times(self, link: Link) -> Times:
        """What sending it once over `link` takes."""
        spent_ns = transfer_ns(self.num_bytes, link)
        return Times(token_ns=spent_ns) if self.per_token else Times(first_ns=spent_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTable:
    """Every group on every device, and every flow, under one workload.

    `groups` is by device position and then group position; None for a device of unknown speed. `inputs_beside` is the
    group whose device the caller's tensors are on, None when they are on the first device whatever is there.
    """

    machine: Machine
    new_tokens: int
    groups: tuple[tuple[Times, ...] | None, ...]
    flows: tuple[FlowSize, ...]
    inputs_beside: int | None

    @classmethod
    def of(cls, graph: ModuleGraph, machine: Machine, quantities: Quantities, new_tokens: int) -> TimeTable:
        """The table of `graph` on `machine` for answers of `new_tokens`."""
        position: Mapping[str, int] = {group.id: i for i, group in enumerate(graph)}
        decode = at_average_length(quantities, new_tokens)
        by_speed: dict[object, tuple[Times, ...] | None] = {}
        for device in machine.devices:
            if device.speed not in by_speed:
                by_speed[device.speed] = _times_on(device, graph, quantities, decode)
        return cls(
            machine=machine,
            new_tokens=new_tokens,
            groups=tuple(by_speed[device.speed] for device in machine.devices),
            flows=tuple(_flow_size(flow, position, quantities, decode) for flow in graph.flows),
            inputs_beside=None if graph.home else _reader_of_ids(graph, position),
        )

    def placed(self, devices: Sequence[int], waiting: Mapping[int, Times] | None = None) -> PlacementTimes | None:
        """The times of a placement, as device positions by group; None when a device's speed is unknown.

        `waiting` is how long devices wait for weights that rest on the host.
        """
        compute = [Times() for _ in self.machine.devices]
        for group, device in enumerate(devices):
            known = self.groups[device]
            if known is None:
                return None
            compute[device] += known[group]
        for device, times in (waiting or {}).items():
            compute[device] += times
        transfers = Times()
        request_ns = [times.request_ns(self.new_tokens) for times in compute]
        for flow in self.flows:
            source, sent = self._copies(flow, devices)
            for target, times in sent.items():
                transfers += times
                request_ns[target] += times.request_ns(self.new_tokens)
            if sent:
                request_ns[source] += max(times.request_ns(self.new_tokens) for times in sent.values())
        total = sum(compute, transfers)
        return PlacementTimes(
            total=total,
            latency_ns=total.request_ns(self.new_tokens),
            stage_ns={device: request_ns[device] for device in sorted(set(devices))},
        )

    def forbidden_copies(self, devices: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs of device positions that a placement sends between although their link is not allowed."""
        pairs = {(source, target) for flow in self.flows for source, target in self._pairs(flow, devices)}
        return sorted(pair for pair in pairs if not link_between(self.machine, *pair).allowed)

    def _copies(self, flow: FlowSize, devices: Sequence[int]) -> tuple[int, dict[int, Times]]:
        """The device that a flow leaves, and its copies by the device they go to."""
        pairs = self._pairs(flow, devices)
        source = pairs[0][0] if pairs else 0
        return source, {target: flow.times(link_between(self.machine, source, target)) for _, target in pairs}

    def _pairs(self, flow: FlowSize, devices: Sequence[int]) -> list[tuple[int, int]]:
        inputs = 0 if self.inputs_beside is None else devices[self.inputs_beside]
        if flow.producer is None and self.inputs_beside is not None:
            return []  # the caller hands each tensor to its reader's device
        source = inputs if flow.producer is None else devices[flow.producer]
        targets = dict.fromkeys(inputs if reader is None else devices[reader] for reader in flow.consumers)
        return [(source, target) for target in targets if target != source]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementTimes:
    """What a placement takes: one stream's times, a whole request's, and every stage's of a full pipeline, by device.

    A stage's time is all that one request costs it: encode, prefill and every decode step, each tensor that enters and
    each that leaves, once. A tensor that leaves for several devices counts once, over the slowest of those links.
    """

    total: Times
    latency_ns: int
    stage_ns: Mapping[int, int]

    @property
    def bottleneck_ns(self) -> int:
        """The slowest stage's time."""
        return max(self.stage_ns.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Seconds that one pass through a group needs for arithmetic, for reading, and to launch its kernels."""

    compute_s: float
    read_s: float
    launch_s: float

    @property
    def total_s(self) -> float:
        """The longer of arithmetic and reading, which overlap, and the launches on top."""
        return max(self.compute_s, self.read_s) + self.launch_s


def roofline(cost: PhaseCost, quantities: Quantities, device: Device) -> Roofline | None:
    """What one pass through a group needs; None on a device of unknown speed."""
    if not device.bandwidth_bytes_per_s or not device.flops_per_s:
        return None
    bandwidth_fraction = device.bandwidth_fraction or BANDWIDTH_FRACTION
    launch_s = LAUNCH_S if device.launch_s is None else device.launch_s
    return Roofline(
        compute_s=cost.flops(quantities) / ((device.flops_fraction or FLOPS_FRACTION) * device.flops_per_s),
        read_s=cost.moved_bytes(quantities) / (bandwidth_fraction * device.bandwidth_bytes_per_s),
        launch_s=cost.launches(quantities) * launch_s,
    )


def group_seconds(cost: PhaseCost, quantities: Quantities, device: Device) -> float | None:
    """Seconds of one pass through a group; None on a device of unknown speed."""
    needs = roofline(cost, quantities, device)
    return needs.total_s if needs else None


def transfer_ns(num_bytes: int, link: Link) -> int:
    """Latency, and bytes over bandwidth."""
    return round((link.latency_s + num_bytes / link.bandwidth_bytes_per_s) * NS_PER_S)


def link_between(machine: Machine, source: int, target: int) -> Link:
    """The link from one device position to another: the machine's own, or what is assumed where it names none."""
    names = machine.devices[source].name, machine.devices[target].name
    for link in machine.links:
        if (link.source, link.target) == names:
            return link
    beside = machine.devices[source].host == machine.devices[target].host
    return Link(
        source=names[0],
        target=names[1],
        bandwidth_bytes_per_s=PCIE_BYTES_PER_S if beside else NETWORK_BYTES_PER_S,
        latency_s=COPY_LATENCY_S if beside else NETWORK_LATENCY_S,
    )


def at_average_length(quantities: Quantities, new_tokens: int) -> Quantities:
    """The counts of a decode step in the middle of an answer."""
    prompt = quantities.text_tokens + quantities.image_tokens
    return replace(quantities, positions=prompt + (new_tokens + 1) // 2)


def _times_on(
    device: Device, graph: ModuleGraph, quantities: Quantities, decode: Quantities
) -> tuple[Times, ...] | None:
    """Every group's times on a device; costs that layers share are priced once."""
    priced: dict[tuple[int, bool], int] = {}

    def nanoseconds(cost: PhaseCost | None, at: Quantities) -> int:
        key = id(cost), at is decode
        if key not in priced:
            priced[key] = round((cost and group_seconds(cost, at, device) or 0.0) * NS_PER_S)
        return priced[key]

    if not device.bandwidth_bytes_per_s or not device.flops_per_s:
        return None
    return tuple(
        Times(
            first_ns=nanoseconds(group.encode, quantities) + nanoseconds(group.prefill, quantities),
            token_ns=nanoseconds(group.decode, decode),
        )
        for group in graph
    )


def _flow_size(flow: Flow, position: Mapping[str, int], quantities: Quantities, decode: Quantities) -> FlowSize:
    per_token = flow.phase == "decode"
    num_bytes: Polynomial = flow.num_bytes
    return FlowSize(
        producer=position.get(flow.producer),
        consumers=_ends(flow.consumers, position),
        num_bytes=num_bytes(decode if per_token else quantities),
        per_token=per_token,
    )


def _ends(names: Iterable[str], position: Mapping[str, int]) -> tuple[int | None, ...]:
    return tuple(position.get(name) for name in names)


def _reader_of_ids(graph: ModuleGraph, position: Mapping[str, int]) -> int:
    """The group that the token ids go to; results come back to its device."""
    readers = [flow.consumers[0] for flow in graph.flows if flow.producer == INPUTS and flow.tensor == "input_ids"]
    return position.get(readers[0], 0) if readers else 0
