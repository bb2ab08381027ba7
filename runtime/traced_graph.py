"""From a trace to the planner's module graph: groups as they run, flows with all consumers, fusions, costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import networkx as nx
from torch import nn

from planner.graph import INPUTS, Flow, Fusion, Interval, ModuleGraph, ModuleGroup, Phase, PhaseCost, Role
from planner.polynomial import constant, variable
from runtime.atoms import tensors_of
from runtime.recorder import INPUTS_LABEL, Sent, Work
from runtime.trace import Trace


def graph_of(trace: Trace, model: nn.Module, name: str) -> ModuleGraph:
    """The module graph that `trace` of `model` shows, for the traced inputs."""
    builder = _Builder(trace, model)
    return ModuleGraph(
        name=name,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        groups=tuple(builder.group(label) for label in builder.labels),
        flows=tuple(builder.flows()),
        fusions=tuple(builder.fusions()),
        intervals=tuple(builder.intervals()),
    )


def home_bytes(trace: Trace) -> int:
    """Most bytes alive at once on the inputs' device, when no group is there to be charged for them."""
    if trace.groups[INPUTS_LABEL]:
        return 0
    return max((interval.peak_bytes[INPUTS_LABEL] for interval in trace.record.intervals), default=0)


class _Builder:
    """What the parts of the graph are read from."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace = trace
        self.model = model
        self.labels = _execution_order(self.trace)
        self.ids = {label: self.trace.groups[label][0].name for label in self.labels}
        self._embedding = _label_of_module(self.trace, self.model, "get_input_embeddings")
        self._head = _label_of_module(self.trace, self.model, "get_output_embeddings")
        self._vision = _vision_labels(self.trace, self._embedding)
        self._kv = _cache_growth(self.trace)
        self._copied = _largest_growth(self.trace)

    def group(self, label: int) -> ModuleGroup:
        atoms = self.trace.groups[label]
        parameters = {id(tensor): tensor for atom in atoms for _, tensor in tensors_of(self.model, atom)}
        work = self.trace.record.work
        first: Phase = "encode" if label in self._vision else "prefill"
        costs: dict[str, PhaseCost | None] = {
            first: _cost(work.get((label, "prefill"))),
            "decode": _cost(work.get((label, "decode")), self._copied.get(label, 0) // self.trace.batch_size),
        }
        return ModuleGroup(
            id=self.ids[label],
            modules=tuple(atom.name for atom in atoms),
            role=self._role(label),
            module_list=atoms[0].module_list,
            weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in parameters.values()),
            num_parameters=sum(prod(t.shape) for t in parameters.values() if isinstance(t, nn.Parameter)),
            kv_bytes_per_position=self._kv.get(label, (0, 0))[0] // self.trace.batch_size,
            buffer_bytes=constant(self._kv.get(label, (0, 0))[1]),
            **costs,
        )

    def _role(self, label: int) -> Role:
        if label in self._vision:
            return "vision_encoder"
        if label == self._embedding:
            return "embedding"
        if label == self._head:
            return "head"
        return "decoder_layer" if self.trace.groups[label][0].module_list else "norm"

    def flows(self) -> Iterator[Flow]:
        """Each tensor once, with all its consumers."""
        position = {label: i for i, label in enumerate(self.labels)}
        sent: dict[tuple[str, int, int, Phase], list[Sent]] = {}
        for one in self.trace.record.sent:
            sent.setdefault((one.tensor, one.source, one.storage, one.phase), []).append(one)
        for (tensor, source, _, phase), copies in sent.items():
            targets = dict.fromkeys(copy.target for copy in copies)
            for backward in (False, True):
                consumers = tuple(
                    self.ids.get(target, INPUTS)
                    for target in targets
                    if (position.get(source, -1) > position.get(target, len(position))) == backward
                )
                if consumers:
                    yield Flow(
                        tensor=tensor,
                        producer=self.ids.get(source, INPUTS),
                        consumers=consumers,
                        phase="encode" if phase == "prefill" and source in self._vision else phase,
                        num_bytes=constant(max(copy.num_bytes for copy in copies)),
                        revisits=backward,
                    )

    def fusions(self) -> Iterator[Fusion]:
        """The default that the vision path stays with the token embedding; what must be together is one group."""
        yield from self._bare_tensors()
        together = [label for label in self.labels if label in self._vision or label == self._embedding]
        if len(together) > 1:
            yield Fusion(
                op="vision path",
                operands=tuple(self.ids[label] for label in together),
                reason="the vision encoder stays beside the token embedding that its features are merged with",
                hard=False,
            )

    def _bare_tensors(self) -> Iterator[Fusion]:
        """Tensors that nothing met: maps name modules, so each goes with its reader, or else with its neighbour."""
        for index, label in enumerate(self.labels):
            if all(not atom.is_module for atom in self.trace.groups[label]):
                readers = [sent.target for sent in self.trace.record.sent if sent.source == label]
                beside = next((r for r in readers if r in self.ids), self.labels[index - 1 if index else 1])
                yield Fusion(
                    op="bare tensor",
                    operands=(self.ids[label], self.ids[beside]),
                    reason="a tensor that no module of its own holds goes with the module that reads it",
                )

    def intervals(self) -> Iterator[Interval]:
        """Bytes alive beyond weights and cache, wherever there are any."""
        cache = _cache_bytes(self.trace)
        for one in self.trace.record.intervals:
            held = {
                self.ids[label]: num_bytes - self.trace.weight_bytes[label] - cache.get((label, one.phase), 0)
                for label, num_bytes in one.peak_bytes.items()
                if label in self.ids
            }
            arrived = {
                self.ids[label]: num_bytes for label, num_bytes in one.arrived_bytes.items() if label in self.ids
            }
            yield Interval(
                phase=one.phase,
                running=self.ids.get(one.running) if one.running is not None else None,
                held=tuple((name, num_bytes) for name, num_bytes in held.items() if num_bytes > 0),
                arrived=tuple(arrived.items()) if one.running in self.ids else (),
            )


def _execution_order(trace: Trace) -> list[int]:
    """Labels of groups that hold something, as they first ran; one that never ran follows its predecessor."""
    ran = [label for label in trace.record.order if trace.groups[label]]
    idle = [label for label, group in enumerate(trace.groups) if group and label not in trace.record.order]
    for label in idle:
        before = next((i for i, other in enumerate(ran) if other == label - 1), len(ran) - 1)
        ran.insert(before + 1, label)
    return ran


def _label_of_module(trace: Trace, model: nn.Module, getter: str) -> int | None:
    try:
        module = getattr(model, getter, lambda: None)()
    except NotImplementedError:  # transformers' answer where a class has no single such module
        return None
    names = {id(found): name for name, found in model.named_modules()}
    name = names.get(id(module))
    for label, group in enumerate(trace.groups):
        if any(name == atom.name for atom in group):
            return label
    return None


def _vision_labels(trace: Trace, embedding: int | None) -> frozenset[int]:
    """Groups that pixels flow through before they meet text: reached from float inputs, not from the embedding."""
    if embedding is None:
        return frozenset()
    record = trace.record
    flow: nx.DiGraph[int] = nx.DiGraph()
    flow.add_nodes_from(range(len(trace.groups)))
    flow.add_edges_from((s.source, s.target) for s in record.sent if s.source != INPUTS_LABEL and s.phase == "prefill")
    entries = {s.target for s in record.sent if s.storage in record.pixel_storages}
    reached = set().union(entries, *(nx.descendants(flow, entry) for entry in entries))
    text = {embedding, *nx.descendants(flow, embedding)}
    return frozenset(reached - text - {INPUTS_LABEL})


def _cache_growth(trace: Trace) -> dict[int, tuple[int, int]]:
    """Per label, cache bytes that one more position of the whole batch adds, and those that do not grow.

    A sliding window's cache grows until it is full, and is charged full.
    """
    growth: dict[int, tuple[int, int]] = {}
    for label, num_bytes, added, window in _cache_tensors(trace):
        per_position, fixed = growth.get(label, (0, 0))
        if added <= 0:
            growth[label] = (per_position, fixed + num_bytes)
        elif window is not None:
            growth[label] = (per_position, fixed + added * window)
        else:
            growth[label] = (per_position + added, fixed)
    return growth


def _largest_growth(trace: Trace) -> dict[int, int]:
    """Per label, bytes that one more position adds to the cache tensor that grows most.

    A cache that grows by concatenation holds that tensor twice while it makes the new one.
    """
    grown: dict[int, int] = {}
    for label, _, added, window in _cache_tensors(trace):
        if window is None:
            grown[label] = max(grown.get(label, 0), added)
    return grown


def _cache_tensors(trace: Trace) -> Iterator[tuple[int, int, int, int | None]]:
    """Label, bytes after a decode step, bytes that the step added, and the sliding window, of every cache tensor."""
    if len(trace.record.caches) > 1:
        before, after = trace.record.caches[:2]
        for path, (label, num_bytes) in after.items():
            window = trace.record.windows.get(path.rpartition(".")[0])
            yield label, num_bytes, num_bytes - before.get(path, (label, 0))[1], window


def _cache_bytes(trace: Trace) -> Mapping[tuple[int, Phase], int]:
    """Cache bytes per label at the end of prefill and of the decode step; charged as cache, not as activations."""
    found: dict[tuple[int, Phase], int] = {}
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    for phase, cache in zip(phases, trace.record.caches, strict=False):
        for label, num_bytes in cache.values():
            found[label, phase] = found.get((label, phase), 0) + num_bytes
    return found


def _cost(work: Work | None, copied_bytes_per_position: int = 0) -> PhaseCost | None:
    if work is None:
        return None
    copied = copied_bytes_per_position * variable("batch") * variable("positions")
    return PhaseCost(flops=constant(work.flops), read_bytes=constant(work.read_bytes), moments_bytes=(copied,))
