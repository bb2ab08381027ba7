"""A module graph with its costs <-> plain data for a file: polynomials are listed once, and named by their place.

Layers of a model share most of their polynomials, and intervals name groups and polynomials many times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from planner.graph import Flow, Fusion, Home, Interval, Linear, ModuleGraph, ModuleGroup, PhaseCost, Range, Tie
from planner.polynomial import ZERO, Polynomial

COSTED_PHASES = ("encode", "prefill", "decode")


def graph_to_dict(graph: ModuleGraph) -> dict[str, Any]:
    """Plain data for JSON or YAML."""
    writer, home = _Writer(graph), graph.home
    content = {
        "name": graph.name,
        "dtype": graph.dtype,
        "valid": {one.variable: [one.low, one.high] for one in graph.valid},
        "home": home and {"modules": list(home.modules), "moments": writer.indices(home.moments_bytes)},
        "groups": [writer.group(group) for group in graph],
        "flows": [writer.flow(flow) for flow in graph.flows],
        "fusions": [
            {"op": one.op, "operands": list(one.operands), "reason": one.reason, "hard": one.hard}
            for one in graph.fusions
        ],
        "intervals": [writer.interval(interval) for interval in graph.intervals],
        **({"ties": [_tie_to(tie) for tie in graph.ties]} if graph.ties else {}),
    }
    return content | {"polynomials": [one.to_dict() for one in writer.polynomials]}


def graph_from_dict(content: Mapping[str, Any]) -> ModuleGraph:
    """The inverse of `graph_to_dict`.

    Raises: KeyError, TypeError or ValueError for content of another form.
    """
    reader = _Reader(content)
    home = content["home"]
    return ModuleGraph(
        name=content["name"],
        dtype=content["dtype"],
        groups=tuple(reader.group(group) for group in content["groups"]),
        flows=tuple(reader.flow(flow) for flow in content["flows"]),
        fusions=tuple(Fusion(**{**one, "operands": tuple(one["operands"])}) for one in content["fusions"]),
        intervals=tuple(reader.interval(interval) for interval in content["intervals"]),
        home=home and Home(modules=tuple(home["modules"]), moments_bytes=reader.polynomials_at(home["moments"])),
        ties=tuple(Tie(**{**one, "groups": tuple(one["groups"])}) for one in content.get("ties", ())),
        valid=tuple(Range(variable=name, low=low, high=high) for name, (low, high) in content["valid"].items()),
    )


def _tie_to(tie: Tie) -> dict[str, Any]:
    return {**asdict(tie), "groups": list(tie.groups)}


class _Writer:
    """Collects the polynomials that the parts name."""

    def __init__(self, graph: ModuleGraph) -> None:
        self.polynomials: list[Polynomial] = []
        self._index: dict[Polynomial, int] = {}
        self._position = {group.id: i for i, group in enumerate(graph)}

    def index(self, polynomial: Polynomial) -> int:
        if polynomial not in self._index:
            self._index[polynomial] = len(self.polynomials)
            self.polynomials.append(polynomial)
        return self._index[polynomial]

    def indices(self, polynomials: tuple[Polynomial, ...]) -> list[int]:
        return [self.index(one) for one in polynomials]

    def group(self, group: ModuleGroup) -> dict[str, Any]:
        costs = {phase: cost for phase in COSTED_PHASES if (cost := getattr(group, phase)) is not None}
        return {
            "id": group.id,
            "modules": list(group.modules),
            "role": group.role,
            "module_list": group.module_list,
            "weight_bytes": group.weight_bytes,
            "num_parameters": group.num_parameters,
            "kv_bytes_per_position": group.kv_bytes_per_position,
            "buffer_bytes": self.index(group.buffer_bytes),
            "logits_bytes": self.index(group.logits_bytes),
            **({"reasons": list(group.reasons)} if group.reasons else {}),
            **({"linears": [[one.name, one.rows, one.cols] for one in group.linears]} if group.linears else {}),
            **{phase: self._cost(cost) for phase, cost in costs.items()},
        }

    def _cost(self, cost: PhaseCost) -> dict[str, Any]:
        return {
            "moments_bytes": self.indices(cost.moments_bytes),
            "flops": self.index(cost.flops),
            "read_bytes": self.index(cost.read_bytes),
            "launches": self.index(cost.launches),
            **(
                {"picked_bytes": self.index(cost.picked_bytes), "table_bytes": cost.table_bytes}
                if cost.table_bytes
                else {}
            ),
        }

    def flow(self, flow: Flow) -> dict[str, Any]:
        marks = {name: True for name in ("lasting", "is_buffer", "revisits") if getattr(flow, name)}
        return {
            "tensor": flow.tensor,
            "producer": flow.producer,
            "consumers": list(flow.consumers),
            "phase": flow.phase,
            "num_bytes": self.index(flow.num_bytes),
            **marks,
        }

    def interval(self, interval: Interval) -> list[Any]:
        """Phase, running group, [group, polynomials] pairs of what is held, [group, polynomial] of what arrived."""
        return [
            interval.phase,
            None if interval.running is None else self._position[interval.running],
            [[self._position[name], self.indices(moments)] for name, moments in interval.held],
            [[self._position[name], self.index(copied)] for name, copied in interval.arrived],
        ]


class _Reader:
    """Finds the polynomials that the parts name."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._polynomials = [Polynomial.from_dict(terms) for terms in content["polynomials"]]
        self._ids = [group["id"] for group in content["groups"]]

    def polynomials_at(self, indices: list[int]) -> tuple[Polynomial, ...]:
        return tuple(self._polynomials[index] for index in indices)

    def group(self, content: Mapping[str, Any]) -> ModuleGroup:
        costs = {phase: self._cost(content[phase]) for phase in COSTED_PHASES if phase in content}
        plain = {key: value for key, value in content.items() if key not in COSTED_PHASES}
        named = {key: self._polynomials[plain[key]] for key in ("buffer_bytes", "logits_bytes")}
        texts = {key: tuple(content.get(key, ())) for key in ("modules", "reasons")}
        linears = tuple(Linear(*one) for one in content.get("linears", ()))
        return ModuleGroup(**{**plain, **named, **costs, **texts, "linears": linears})

    def _cost(self, content: Mapping[str, Any]) -> PhaseCost:
        named = {key: self._polynomials[content[key]] for key in ("flops", "read_bytes", "launches")}
        picked = self._polynomials[content["picked_bytes"]] if "picked_bytes" in content else ZERO
        return PhaseCost(
            moments_bytes=self.polynomials_at(content["moments_bytes"]),
            picked_bytes=picked,
            table_bytes=content.get("table_bytes", 0),
            **named,
        )

    def flow(self, content: Mapping[str, Any]) -> Flow:
        num_bytes = self._polynomials[content["num_bytes"]]
        return Flow(**{**content, "consumers": tuple(content["consumers"]), "num_bytes": num_bytes})

    def interval(self, content: list[Any]) -> Interval:
        phase, running, held, arrived = content
        return Interval(
            phase=phase,
            running=None if running is None else self._ids[running],
            held=tuple((self._ids[group], self.polynomials_at(indices)) for group, indices in held),
            arrived=tuple((self._ids[group], self._polynomials[index]) for group, index in arrived),
        )
