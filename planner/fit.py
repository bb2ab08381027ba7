"""Costs for any workload from a few traced runs: polynomials through the samples, never under any of them.

Runs of one kind take the same operations in the same order, whatever the sizes. So the bytes alive after the n-th
allocation of an interval are one polynomial, and the largest of those is exact wherever the peak moves to. Where two
runs differ in operations (a loop over images), the largest of the interval stands for all its moments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise
from math import prod

from planner.graph import INPUTS, PHASES, Flow, Home, Interval, ModuleGraph, ModuleGroup, Phase, PhaseCost, Range
from planner.polynomial import VARIABLES, ZERO, Polynomial, Quantities, from_terms

PROMPT_COUNTS = ("images", "patches", "image_tokens", "text_tokens")
DECODE_COUNTS = ("images", "patches", "image_tokens", "positions")
"""What costs of a phase may depend on, per sequence. A decode step sees the prompt's length as the cache's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledInterval:
    """The time between two module boundaries in one run, in which group `running` ran, or None: a container's own code.

    `alive_bytes` are, by group or `INPUTS`, the activations alive at its start and after each allocation.
    """

    phase: Phase
    running: str | None
    alive_bytes: tuple[tuple[str, tuple[int, ...]], ...]
    arrived_bytes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One traced run: what it amounted to, the graph with that run's costs, and its intervals.

    `quantities.positions` is the cache's length in the decode step that was watched.
    """

    quantities: Quantities
    graph: ModuleGraph
    intervals: tuple[SampledInterval, ...]


class UnlikeSamplesError(ValueError):
    """Runs that do not take the same way through the model, so that no polynomial holds for both."""


def fit(samples: Sequence[Sample], bend: int | None = None) -> ModuleGraph:
    """The graph whose costs go through all samples where polynomials of degree 2 can, and above them elsewhere.

    Degrees count per sequence; any term may be multiplied by the batch size. With one sample all costs are constants.
    `bend` is a length in positions, such as a sliding window's, at which costs may turn into other polynomials.
    Raises: UnlikeSamplesError when groups or intervals differ between samples.
    """
    _refuse_unlike(samples)
    fitter = _Fitter(samples, bend)
    return replace(
        samples[0].graph,
        groups=tuple(map(fitter.group, *(sample.graph.groups for sample in samples))),
        flows=tuple(fitter.flows()),
        intervals=tuple(_without_covered(list(fitter.intervals()))),
        home=fitter.home(),
        valid=tuple(_ranges([sample.quantities for sample in samples])),
    )


def _refuse_unlike(samples: Sequence[Sample]) -> None:
    """Raise UnlikeSamplesError where samples differ in more than sizes."""
    shapes = [
        (
            [(group.modules, group.weight_bytes, group.kv_bytes_per_position) for group in sample.graph],
            [(interval.phase, interval.running) for interval in sample.intervals],
        )
        for sample in samples
    ]
    for what, *found in zip(("groups", "intervals"), *shapes, strict=True):
        if any(one != found[0] for one in found):
            raise UnlikeSamplesError(f"{samples[0].graph.name}: the {what} of runs of other sizes differ")


class _Fitter:
    """The parts of the fitted graph, each from the same part of every sample."""

    def __init__(self, samples: Sequence[Sample], bend: int | None) -> None:
        self._samples = samples
        self._quantities = [sample.quantities for sample in samples]
        self._bases = {phase: _Basis(self._quantities, phase, bend) for phase in PHASES}

    def group(self, *parts: ModuleGroup) -> ModuleGroup:
        """A group's costs. Its moments stay those of an only sample; intervals say more where there are several."""

        def cost(phase: Phase) -> PhaseCost | None:
            if not any(part.cost(phase) for part in parts):
                return None
            costs = [part.cost(phase) or PhaseCost() for part in parts]
            return PhaseCost(
                moments_bytes=costs[0].moments_bytes if len(parts) == 1 else (),
                flops=self._through(phase, [one.flops for one in costs]),
                read_bytes=self._through(phase, [one.read_bytes for one in costs]),
                launches=self._through(phase, [one.launches for one in costs]),
                picked_bytes=self._through(phase, [one.picked_bytes for one in costs]),
                table_bytes=max(one.table_bytes for one in costs),
            )

        return replace(
            parts[0],
            buffer_bytes=self._through("prefill", [part.buffer_bytes for part in parts]),
            encode=cost("encode"),
            prefill=cost("prefill"),
            decode=cost("decode"),
        )

    def flows(self) -> Iterator[Flow]:
        """Every flow that a sample has; what does not flow in a sample counts no bytes there."""
        found: dict[tuple[object, ...], dict[int, Flow]] = {}
        for index, sample in enumerate(self._samples):
            for key, flow in _numbered(sample.graph.flows):
                found.setdefault(key, {})[index] = flow
        for by_sample in found.values():
            first = next(iter(by_sample.values()))
            num_bytes = [by_sample[i].num_bytes if i in by_sample else ZERO for i in range(len(self._samples))]
            yield replace(first, num_bytes=self._through(first.phase, num_bytes))

    def intervals(self) -> Iterator[Interval]:
        """Every interval in which groups hold something."""
        for parts in self._aligned():
            held = {name: found for name, found in self._moments(parts).items() if name != INPUTS}
            sources = [dict(part.arrived_bytes) for part in parts]
            basis = self._bases[parts[0].phase]
            # What a shared device saves: never more than it does.
            arrived = {name: basis.below([source.get(name, 0) for source in sources]) for name in sources[0]}
            if held:
                yield Interval(
                    phase=parts[0].phase,
                    running=parts[0].running,
                    held=tuple(held.items()),
                    arrived=tuple(arrived.items()),
                )

    def home(self) -> Home | None:
        """What inputs and results hold, over all intervals."""
        home = self._samples[0].graph.home
        found = [moment for parts in self._aligned() for moment in self._moments(parts).get(INPUTS, ())]
        return home and replace(home, moments_bytes=_largest(found))

    def _aligned(self) -> Iterator[tuple[SampledInterval, ...]]:
        return zip(*(sample.intervals for sample in self._samples), strict=True)

    def _moments(self, parts: Sequence[SampledInterval]) -> dict[str, tuple[Polynomial, ...]]:
        """By group, the moments of one interval that may be its peak; groups that hold nothing are left out."""
        basis = self._bases[parts[0].phase]
        found: dict[str, tuple[Polynomial, ...]] = {}
        by_name = [dict(part.alive_bytes) for part in parts]
        for name in dict.fromkeys(name for one in by_name for name in one):
            alive = [one.get(name, (0,)) for one in by_name]
            if len({len(values) for values in alive}) > 1:
                alive = [(max(values),) for values in alive]
            series = dict.fromkeys(zip(*alive, strict=True))
            moments = _largest(moment for values in series for moment in basis.moments_through(values))
            if moments:
                found[name] = moments
        return found

    def _through(self, phase: Phase, costs: Iterable[Polynomial]) -> Polynomial:
        values = [cost(quantities) for cost, quantities in zip(costs, self._quantities, strict=True)]
        return self._bases[phase].through(values)


class _Basis:
    """The monomials that samples can tell apart in a phase, and the polynomials found through values at them."""

    def __init__(self, quantities: Sequence[Quantities], phase: Phase, bend: int | None = None) -> None:
        columns = [[Fraction(_value(names, q)) for q in quantities] for names in _monomials(phase)]
        kept = _independent(columns)
        rows = [[columns[column][row] for column in kept] for row in range(len(quantities))]
        self._quantities = quantities
        self._names = [_monomials(phase)[column] for column in kept]
        self._chosen = _independent(rows)
        self._inverse = _inverted([rows[row] for row in self._chosen])
        self._varied = _only_varied(quantities, phase)
        self._sides = list(_sides(quantities, phase, bend)) if bend is not None else []
        self._found: dict[tuple[int, ...], Polynomial] = {}
        self._moments: dict[tuple[int, ...], tuple[Polynomial, ...]] = {}

    def through(self, values: Sequence[int]) -> Polynomial:
        """The polynomial with these values at the samples; where there is none, one that is nowhere below them."""
        key = tuple(values)
        if key not in self._found:
            self._found[key] = self._raised(self._interpolated(key), key) if any(key) else ZERO
        return self._found[key]

    def below(self, values: Sequence[int]) -> Polynomial:
        """The polynomial with these values at the samples; where there is none, one that is nowhere above them."""
        polynomial = self._interpolated(tuple(values))
        excess = (polynomial(q) - value for q, value in zip(self._quantities, values, strict=True))
        return polynomial + -max(0, *excess)

    def moments_through(self, values: tuple[int, ...]) -> tuple[Polynomial, ...]:
        """Polynomials whose maximum has these values at the samples, or more.

        A window that fills up bends a cost. Then it is the secants of neighbouring samples, where only one count
        varies, or else a polynomial for either side of the bend.
        """
        if values not in self._moments:
            self._moments[values] = tuple(self._pieces(values))
        return self._moments[values]

    def _pieces(self, values: tuple[int, ...]) -> Iterator[Polynomial]:
        polynomial = self.through(values)
        exact = all(polynomial(q) == value for q, value in zip(self._quantities, values, strict=True))
        if exact or not (self._varied or self._sides):
            yield polynomial
        elif self._varied:
            yield from self._secants(values)
        else:
            for members, side in self._sides:
                yield side.through([values[member] for member in members])

    def _secants(self, values: tuple[int, ...]) -> Iterator[Polynomial]:
        """Lines through neighbouring samples, rounded up; together they are below none."""
        counts = [getattr(quantities, self._varied) for quantities in self._quantities]
        points = sorted(set(zip(counts, values, strict=True)))
        for (left, low), (right, high) in pairwise(points):
            slope = -((low - high) // (right - left))
            start = max(low - slope * left, high - slope * right)
            yield from_terms({(self._varied,): slope, (): start})

    def _interpolated(self, values: tuple[int, ...]) -> Polynomial:
        known = [values[row] for row in self._chosen]
        factors = (sum(a * b for a, b in zip(row, known, strict=True)) for row in self._inverse)
        return from_terms({names: round(factor) for names, factor in zip(self._names, factors, strict=True)})

    def _raised(self, polynomial: Polynomial, values: tuple[int, ...]) -> Polynomial:
        short = (value - polynomial(q) for value, q in zip(values, self._quantities, strict=True))
        return polynomial + max(0, *short)


def _numbered(flows: Iterable[Flow]) -> Iterator[tuple[tuple[object, ...], Flow]]:
    """Flows with what tells them apart in any run; of equal ones, their number."""
    seen: Counter[tuple[object, ...]] = Counter()
    for flow in flows:
        key = (flow.phase, flow.tensor, flow.producer, flow.consumers, flow.revisits)
        yield (*key, seen[key]), flow
        seen[key] += 1


def _sides(quantities: Sequence[Quantities], phase: Phase, bend: int) -> Iterator[tuple[list[int], _Basis]]:
    """The samples up to a bend and those from it on, each with a basis of their own."""
    lengths = [q.positions if phase == "decode" else q.text_tokens + q.image_tokens for q in quantities]
    for members in (
        [i for i, length in enumerate(lengths) if length <= bend],
        [i for i, length in enumerate(lengths) if length >= bend],
    ):
        if members:
            yield members, _Basis([quantities[i] for i in members], phase)


def _only_varied(quantities: Sequence[Quantities], phase: Phase) -> str:
    """The one count that the samples differ in; empty where there are none or several."""
    counts = ("batch", *(DECODE_COUNTS if phase == "decode" else PROMPT_COUNTS))
    varied = [name for name in counts if len({getattr(one, name) for one in quantities}) > 1]
    return varied[0] if len(varied) == 1 else ""


def _monomials(phase: Phase) -> list[tuple[str, ...]]:
    """Simple ones first: those are kept where samples cannot tell more apart."""
    counts = DECODE_COUNTS if phase == "decode" else PROMPT_COUNTS
    alone = [names for degree in range(3) for names in combinations_with_replacement(counts, degree)]
    return [tuple(sorted(names)) for names in (*alone, *(("batch", *names) for names in alone))]


def _value(names: Iterable[str], quantities: Quantities) -> int:
    return prod(getattr(quantities, name) for name in names)


def _independent(vectors: Sequence[Sequence[Fraction]]) -> list[int]:
    """Indices of the vectors that are linearly independent of those before them."""
    reduced: list[tuple[int, list[Fraction]]] = []
    kept = []
    for index, vector in enumerate(vectors):
        rest = list(vector)
        for pivot, other in reduced:
            if factor := rest[pivot] / other[pivot]:
                rest = [a - factor * b for a, b in zip(rest, other, strict=True)]
        pivots = [i for i, value in enumerate(rest) if value]
        if pivots:
            reduced.append((pivots[0], rest))
            kept.append(index)
    return kept


def _inverted(matrix: Sequence[Sequence[Fraction]]) -> list[list[Fraction]]:
    """The inverse of a regular matrix, by Gauss and Jordan."""
    size = len(matrix)
    rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            if i != column and (factor := rows[i][column]):
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return [row[size:] for row in rows]


def _largest(moments: Iterable[Polynomial]) -> tuple[Polynomial, ...]:
    """Those that no other one covers, and that may be above zero."""
    kept: list[Polynomial] = []
    for moment in moments:
        if not ZERO.covers(moment) and not any(other.covers(moment) for other in kept):
            kept = [other for other in kept if not moment.covers(other)] + [moment]
    return tuple(kept)


def _without_covered(intervals: list[Interval]) -> Iterator[Interval]:
    """Intervals that can be a peak: in no other one of their phase does every group hold as much or more."""
    kept: dict[Phase, list[Interval]] = {}
    for interval in sorted(intervals, key=lambda one: -len(one.held)):
        others = kept.setdefault(interval.phase, [])
        if not any(_covers(other, interval) for other in others):
            others.append(interval)
    order = {id(interval): i for i, interval in enumerate(intervals)}
    yield from sorted((one for found in kept.values() for one in found), key=lambda one: order[id(one)])


def _covers(interval: Interval, other: Interval) -> bool:
    """Whether `interval` is never below `other`, on whatever devices its groups are."""
    if interval.arrived and (interval.running, interval.arrived) != (other.running, other.arrived):
        return False
    held = dict(interval.held)
    return all(
        any(mine.covers(moment) for mine in held.get(name, ())) for name, moments in other.held for moment in moments
    )


def _ranges(quantities: Sequence[Quantities]) -> Iterator[Range]:
    for variable in VARIABLES:
        values = [getattr(one, variable) for one in quantities]
        yield Range(variable=variable, low=min(values), high=max(values))
