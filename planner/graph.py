"""The module dependency graph: what must be placed, what flows between it, and what must stay together.

Groups are listed in execution order. Costs are polynomials in the workload's counts, so one graph answers any batch,
image count and context; bytes already follow the dtypes the graph was built for. This file knows no machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import networkx as nx

from planner.polynomial import ZERO, Polynomial, Quantities

Role = Literal["vision_encoder", "projector", "embedding", "decoder_layer", "norm", "head"]
Phase = Literal["encode", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("encode", "prefill", "decode")

INPUTS = "inputs"
"""Producer of the flows that the caller hands to the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCost:
    """What one group costs in one phase.

    `moments_bytes` are the bytes alive at the moments that may be the peak while the group runs, its input and output
    included; which of them is depends on the workload. `flops` count a multiply-add as two; `read_bytes` are all
    operands that its kernels read, weights, activations and KV cache alike; `launches` are kernels. Experts, of which
    there are `table_bytes`, are apart: `picked_bytes` count one for every token and choice, whether or not others
    chose it too.
    """

    moments_bytes: tuple[Polynomial, ...] = ()
    flops: Polynomial = ZERO
    read_bytes: Polynomial = ZERO
    launches: Polynomial = ZERO
    picked_bytes: Polynomial = ZERO
    table_bytes: int = 0

    def moved_bytes(self, quantities: Quantities) -> int:
        """What is read in one pass: operands, and the experts that the batch's tokens are expected to reach.

        Every sequence picks its share of the experts, independently of the others and evenly; of a prompt's tokens
        the choices are taken to differ, until they are all experts.
        """
        picked = self.picked_bytes(quantities)
        if not picked:
            return self.read_bytes(quantities)
        share = min(1.0, picked / (quantities.batch * self.table_bytes))
        return self.read_bytes(quantities) + round(self.table_bytes * (1 - (1 - share) ** quantities.batch))

    def transient_bytes(self, quantities: Quantities) -> int:
        """The largest of the moments under one workload."""
        return max((moment(quantities) for moment in self.moments_bytes), default=0)


@dataclass(frozen=True, slots=True)
class Linear:
    """The weight of a linear layer, without its bias: the layer's FQN, and output and input width."""

    name: str
    rows: int
    cols: int

    @property
    def num_weights(self) -> int:
        """Elements of the weight."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleGroup:
    """What is placed as one: some modules, named by their FQNs, and what they cost wherever they are.

    `module_list` names the list whose element the group is, such as `model.layers`; a device then holds a contiguous
    run of that list. `kv_bytes_per_position` is per sequence. `reasons` are the operations for whose sake its modules
    are one group, where a trace has merged them. `linears` are the layers whose weights can be held in fewer bits.
    `loading_bytes` are there beside the weights for a moment while those are loaded.
    """

    id: str
    modules: tuple[str, ...]
    role: Role
    weight_bytes: int
    num_parameters: int
    module_list: str | None = None
    kv_bytes_per_position: int = 0
    buffer_bytes: Polynomial = ZERO
    logits_bytes: Polynomial = ZERO
    encode: PhaseCost | None = None
    prefill: PhaseCost | None = None
    decode: PhaseCost | None = None
    reasons: tuple[str, ...] = ()
    linears: tuple[Linear, ...] = ()
    loading_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError(f"group {self.id!r} holds no modules: a group is one or more FQNs")
        if min(self.weight_bytes, self.num_parameters, self.kv_bytes_per_position) < 0:
            raise ValueError(f"group {self.id!r} has a negative cost: bytes and counts are zero or more")

    def cost(self, phase: Phase) -> PhaseCost | None:
        """The group's cost in `phase`, or None when it does not run then."""
        return {"encode": self.encode, "prefill": self.prefill, "decode": self.decode}[phase]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One tensor, its producer and all its consumers; sent once per destination device.

    A `lasting` flow stays alive until its phase ends, on every device that produces or consumes it. `is_buffer` says
    that it is accounted as a buffer (rotary tables, masks) instead of an activation. One that `revisits` leads to a
    group that has run before, such as a head tied to the embedding, and binds no order.
    """

    tensor: str
    producer: str
    consumers: tuple[str, ...]
    phase: Phase
    num_bytes: Polynomial
    lasting: bool = False
    is_buffer: bool = False
    revisits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """An op whose operands come from several groups and must share a device.

    `hard` means that the op fails otherwise; a soft one is a default that a user may lift.
    """

    op: str
    operands: tuple[str, ...]
    reason: str
    hard: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Activation bytes that a traced run held at once, between two module boundaries, by group.

    A group held the largest of its `held` moments; which of them that is depends on the workload. `arrived` are bytes
    of copies that group `running` got from others: on a device that holds both there is no copy.
    """

    phase: Phase
    running: str | None
    held: tuple[tuple[str, tuple[Polynomial, ...]], ...]
    arrived: tuple[tuple[str, Polynomial], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """That inputs and results are on the first device, as accelerate puts them, and what they hold there.

    `modules` are the model's own bare tensors, which lie with them; `moments_bytes` leaves those out.
    """

    modules: tuple[str, ...] = ()
    moments_bytes: tuple[Polynomial, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """Weights that several groups count although they are one, such as those of an embedding and a head.

    A device holds them once, however many of the groups it has; `num_bytes` and `num_parameters` are of one copy.
    """

    groups: tuple[str, ...]
    num_bytes: int
    num_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Values of one count of `Quantities` between which costs were traced, both included."""

    variable: str
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleGraph:
    """A model as a placement problem sees it.

    Activations are given by the groups' moments and lasting flows, or by the `intervals` of a trace. `valid` lists the
    counts that a trace varied, `assumptions` what costs rest on where nothing was traced; `home` is None where every
    input goes to its consumer. `ties` are weights that may be kept on several devices. Where some weights are in fewer
    bits, `held` names these linear layers and their layouts, and `plain` is the graph with all in its dtype.

    Raises: ValueError for a group named twice, a module in two groups, or a flow, fusion or tie of an unknown group.
    """

    name: str
    dtype: str
    groups: tuple[ModuleGroup, ...]
    flows: tuple[Flow, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    intervals: tuple[Interval, ...] = ()
    home: Home | None = None
    valid: tuple[Range, ...] = ()
    assumptions: tuple[str, ...] = ()
    ties: tuple[Tie, ...] = ()
    held: tuple[tuple[str, str], ...] = ()
    plain: ModuleGraph | None = None

    def __post_init__(self) -> None:
        ids = [group.id for group in self.groups]
        _refuse_repeats("group", ids)
        _refuse_repeats("module", [module for group in self.groups for module in group.modules])
        known = {*ids, INPUTS}
        for flow in self.flows:
            _refuse_unknown(f"flow {flow.tensor!r}", (flow.producer, *flow.consumers), known)
        for fusion in self.fusions:
            _refuse_unknown(f"fusion {fusion.op!r}", fusion.operands, set(ids))
        for tie in self.ties:
            _refuse_unknown("a tie", tie.groups, set(ids))

    def __iter__(self) -> Iterator[ModuleGroup]:
        return iter(self.groups)

    def group(self, group_id: str) -> ModuleGroup:
        """The group of that id; KeyError when there is none."""
        for group in self.groups:
            if group.id == group_id:
                return group
        raise KeyError(group_id)

    def extrapolated(self, quantities: Quantities) -> tuple[str, ...]:
        """The counts that lie outside what was traced."""
        values = {one.variable: getattr(quantities, one.variable) for one in self.valid}
        return tuple(one.variable for one in self.valid if not one.low <= values[one.variable] <= one.high)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in the graph's dtypes, tied ones once."""
        repeated = sum(tie.num_bytes * (len(tie.groups) - 1) for tie in self.ties)
        return sum(group.weight_bytes for group in self.groups) - repeated

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        repeated = sum(tie.num_parameters * (len(tie.groups) - 1) for tie in self.ties)
        return sum(group.num_parameters for group in self.groups) - repeated

    @property
    def kv_bytes_per_position(self) -> int:
        """KV cache bytes that one position of one sequence takes over all groups."""
        return sum(group.kv_bytes_per_position for group in self.groups)

    @property
    def cached_lists(self) -> frozenset[str]:
        """The module lists some of whose elements have a KV cache: the decoder layers, whatever else is called so.

        Where no cache grows with the context, as with windows alone, those that run in a decode step.
        """
        layers = [group for group in self if group.module_list and group.role == "decoder_layer"]
        cached = [group for group in layers if group.kv_bytes_per_position]
        found = cached or [group for group in layers if group.decode is not None]
        return frozenset(group.module_list for group in found if group.module_list)


def dependency_graph(graph: ModuleGraph) -> nx.DiGraph[str]:
    """The groups as a networkx graph: an edge where a tensor of any phase flows, with its tensors' names.

    Nodes carry `role`, `weight_bytes` and `modules`; node order is execution order.
    """
    network: nx.DiGraph[str] = nx.DiGraph(name=graph.name)
    for group in graph:
        network.add_node(group.id, role=group.role, weight_bytes=group.weight_bytes, modules=group.modules)
    for flow in graph.flows:
        for consumer in flow.consumers:
            if INPUTS not in (flow.producer, consumer) and not flow.revisits and flow.producer != consumer:
                tensors = network.get_edge_data(flow.producer, consumer, {"tensors": ()})["tensors"]
                network.add_edge(flow.producer, consumer, tensors=(*tensors, flow.tensor))
    return network


def _refuse_repeats(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"{what} named more than once: {', '.join(repeated)}")


def _refuse_unknown(what: str, names: tuple[str, ...], known: set[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what} names unknown groups: {', '.join(unknown)}")
