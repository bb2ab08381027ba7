"""Runs a model under a device map as accelerate would, and goes on past everything that would stop a real run.

A proof refuses a map with a hole in it; a diagnosis runs it and sees what the hole does.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn

from planner.graph import Phase
from planner.paths import owner
from runtime.devices import UNLIMITED_BYTES
from runtime.diagnosis.cuda_literals import CudaLiterals
from runtime.mismatch import Mismatch, Place, calling_place, place_of
from runtime.op_costs import flops_of, traffic_of
from runtime.proof import ProofWatch, Transfer, signature
from runtime.recorder import storage_id
from runtime.relocate import relocate, tensors_in
from runtime.steps import Steps
from runtime.trace import is_shape_only
from runtime.twin import let_go, make_twin
from runtime.virtual import DeviceMismatchError, MemoryLedger, virtual_gpus
from runtime.virtual.process import PROCESS

STOPS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, ImportError)
"""What model code raises when something in it is not as it expects; torch's own errors are RuntimeErrors."""

ROOT = "the model"
"""What the root is called among the modules that run."""

ACCELERATES_WARNING = "The following device_map keys do not match any submodules"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """An exception that ended a run: what it said, and the innermost line of model code."""

    error: str
    place: Place | None
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one device held and did, in bytes and FLOPs, by phase where that matters.

    `peak_bytes` are the most alive at once, weights and cache included; `cache_bytes` are the cache's when the phase
    ended. Of the cache, `growth_bytes` is what each further position of the batch adds, `fixed_cache_bytes` what does
    not grow, sliding windows counted full.
    """

    weight_bytes: int
    peak_bytes: Mapping[Phase, int]
    cache_bytes: Mapping[Phase, int]
    growth_bytes: int
    fixed_cache_bytes: int
    flops: Mapping[Phase, int]
    read_bytes: Mapping[Phase, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRun:
    """What a run showed. `raw_reads` are parameters that were read while the module that holds them did not run."""

    mismatches: tuple[Mismatch, ...]
    stop: Stop | None
    transfers: tuple[Transfer, ...]
    raw_reads: Mapping[str, Place]
    literals: tuple[Place, ...]
    usage: Mapping[int, Usage]
    num_steps: int

    @property
    def ok(self) -> bool:
        """Whether it ran to its end and nothing met that lay apart."""
        return not self.mismatches and self.stop is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a map is run: the GPU of every entry, the main one, and tensors left on the CPU.

    `inputs_at` is where the caller puts inputs, None for the main GPU; accelerate brings them there in any case.
    `skips_between` leaves out what meets between forwards: decode steps prepare their inputs much as `generate()` does,
    and where that is run as well, it says more truly what it does.
    """

    placement: Mapping[str, int]
    home: int
    on_host: frozenset[str] = frozenset()
    inputs_at: int | None = None
    skips_between: bool = False


def run_map(model: nn.Module, inputs: Mapping[str, Any], setting: Setting, steps: Steps) -> MapRun:
    """The outcome of `steps` on a copy of `model` placed as `setting` says, under accelerate's hooks."""
    num_devices = max(*setting.placement.values(), setting.home) + 1
    gpus = virtual_gpus([UNLIMITED_BYTES] * num_devices, shape_only=is_shape_only(model))

    def device_of(name: str) -> torch.device:
        entry = owner(name, setting.placement)
        if name in setting.on_host or entry is None:
            return torch.device("cpu")
        return gpus.devices[setting.placement[entry]]

    twin = make_twin(model, device_of)
    watch = MapWatch(twin, gpus.ledger, skips_between=setting.skips_between)
    _dispatch(twin, setting)
    watch.note_weights()
    start = gpus.devices[setting.home if setting.inputs_at is None else setting.inputs_at]
    placed = relocate(dict(inputs), lambda tensor: tensor.to(start))
    literals, stop, results = CudaLiterals(), None, []
    PROCESS.observer = watch
    try:
        with torch.no_grad(), literals:
            results = steps(twin, placed, watch)
    except STOPS as error:
        stop = _stop(error, watch.phase)
    finally:
        PROCESS.observer = None
    watch.end_phase()
    outcome = MapRun(
        mismatches=_one_each(watch.mismatches),
        stop=stop,
        transfers=watch.transfers,
        raw_reads=watch.raw_reads,
        literals=tuple(literals.places),
        usage={index: watch.usage(index) for index in range(num_devices)},
        num_steps=len(results),
    )
    let_go(twin)
    return outcome


def _one_each(mismatches: Sequence[Mismatch]) -> tuple[Mismatch, ...]:
    """The first of each operation, line, set of devices, and module whose code ran: every layer that is cut counts."""
    found: dict[tuple[object, ...], Mismatch] = {}
    for one in mismatches:
        found.setdefault((one.op, one.file, one.line, frozenset(one.devices), one.within), one)
    return tuple(found.values())


def _dispatch(twin: nn.Module, setting: Setting) -> None:
    with warnings.catch_warnings():
        # Bare tensors need their entries, or accelerate refuses the map, and have no module for accelerate to find.
        warnings.filterwarnings("ignore", message=ACCELERATES_WARNING)
        dispatch_model(
            twin,
            dict(setting.placement),
            main_device=setting.home,
            skip_keys=getattr(twin, "_skip_keys_device_placement", None),
            force_hooks=True,
        )


def _stop(error: BaseException, phase: Phase) -> Stop:
    """The exception as text; keeping it would keep its frames, and with them tensors on the virtual GPUs."""
    message = " ".join(str(error).split())
    place = place_of(error)
    traceback.clear_frames(error.__traceback__)
    return Stop(error=f"{type(error).__name__}: {message[:300]}", place=place, phase=phase)


@dataclass(slots=True)
class _Tally:
    """Counts of one phase, by device index."""

    peak_bytes: Counter[int] = field(default_factory=Counter)
    cache_bytes: Counter[int] = field(default_factory=Counter)
    flops: Counter[int] = field(default_factory=Counter)
    read_bytes: Counter[int] = field(default_factory=Counter)


class MapWatch(ProofWatch):
    """Notes besides who meets whom: what every device held and did, and parameters read past their modules."""

    def __init__(self, twin: nn.Module, ledger: MemoryLedger, *, skips_between: bool) -> None:
        super().__init__(twin)
        self._skips_between = skips_between
        self.raw_reads: dict[str, Place] = {}
        self._ledger = ledger
        self._tallies: dict[Phase, _Tally] = {}
        self._weight_bytes: list[int] = []
        self._names: dict[int, list[str]] = {}
        self._cache_sizes: list[dict[str, tuple[int, int]]] = []
        self._windows: dict[str, int] = {}

    def note_weights(self) -> None:
        """Everything is in its place: what is alive now are weights and buffers."""
        named = (
            *self.twin.named_parameters(remove_duplicate=False),
            *self.twin.named_buffers(remove_duplicate=False),
        )
        for name, tensor in named:
            self._names.setdefault(_identity(tensor), []).append(name)
        self._weight_bytes = [self._ledger.allocated_bytes(index) for index in range(self._ledger.num_devices)]
        self._ledger.reset_peak()

    def note_cache(self, cache: Any) -> None:
        """A step has ended: its peaks, and what the cache holds where."""
        sizes = {
            path: (tensor.device.index or 0, tensor.numel() * tensor.element_size())
            for path, tensor in tensors_in(cache)
        }
        self._cache_sizes.append(sizes)
        for index, layer in enumerate(getattr(cache, "layers", ())):
            if getattr(layer, "is_sliding", False):
                self._windows[f".layers.{index}"] = layer.sliding_window
        totals: Counter[int] = Counter()
        for index, num_bytes in sizes.values():
            totals[index] += num_bytes
        self._tally.cache_bytes = totals
        self.end_phase()

    def end_phase(self) -> None:
        """Read the peaks since the last call into the phase that has just run."""
        for index in range(self._ledger.num_devices):
            peak = self._ledger.peak_bytes(index)
            self._tally.peak_bytes[index] = max(self._tally.peak_bytes[index], peak)
        self._ledger.reset_peak()

    @property
    def _tally(self) -> _Tally:
        return self._tallies.setdefault(self.phase, _Tally())

    def mismatched(self, problem: DeviceMismatchError, tensors: Sequence[torch.Tensor]) -> None:
        """An operation with operands from several devices, and the module whose code it stands in."""
        if self._skips_between and len(self._running) == 1:
            return
        self.mismatches.append(
            Mismatch(
                op=problem.op_name,
                place=calling_place(),
                operands=tuple(operand.argument for operand in problem.operands),
                devices=tuple(operand.device for operand in problem.operands),
                modules=tuple(map(signature, tensors)),
                phase=self.phase,
                within=self._running[-1],
                tensors=tuple(self._names.get(_identity(tensor), [""])[0] for tensor in tensors),
            )
        )

    def ran(self, op: Any, args: Sequence[Any], outcome: Any) -> None:
        """An operation: counted for its device, and its operands compared with the modules that run."""
        super().ran(op, args, outcome)
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        for tensor in tensors:
            names = self._names.get(_identity(tensor), [])
            if names and not any((name.rpartition(".")[0] or ROOT) in self._running for name in names):
                self.raw_reads.setdefault(names[0], calling_place())
        first = outcome[0] if isinstance(outcome, list | tuple) and outcome else outcome
        if isinstance(first, torch.Tensor) and first.device.index is not None:
            tally = self._tally
            tally.read_bytes[first.device.index] += traffic_of(op, args, outcome).most_bytes
            tally.flops[first.device.index] += flops_of(op, args, outcome)

    def usage(self, index: int) -> Usage:
        """What one device held and did."""
        growth_bytes, fixed_bytes = self._cache_growth(index)
        tallies = self._tallies.items()
        return Usage(
            weight_bytes=self._weight_bytes[index],
            peak_bytes={phase: tally.peak_bytes[index] for phase, tally in tallies},
            cache_bytes={phase: tally.cache_bytes[index] for phase, tally in tallies},
            growth_bytes=growth_bytes,
            fixed_cache_bytes=fixed_bytes,
            flops={phase: tally.flops[index] for phase, tally in tallies},
            read_bytes={phase: tally.read_bytes[index] for phase, tally in tallies},
        )

    def _cache_growth(self, index: int) -> tuple[int, int]:
        """Cache bytes on a device that one more position adds, and those that do not grow."""
        growth_bytes, fixed_bytes = 0, 0
        before, after = self._cache_sizes[-2:] if len(self._cache_sizes) > 1 else ({}, {})
        for path, (device, num_bytes) in after.items():
            added = num_bytes - before.get(path, (device, num_bytes))[1]
            window = self._windows.get(path.rpartition(".")[0])
            if device != index:
                continue
            if added <= 0:
                fixed_bytes += num_bytes
            elif window is not None:
                fixed_bytes += added * window
            else:
                growth_bytes += added
        return growth_bytes, fixed_bytes


def _identity(tensor: torch.Tensor) -> int:
    """Equal for tensors that share their bytes, on a virtual GPU (positive) or on the host (negative)."""
    return storage_id(tensor) if tensor.device.type == "vgpu" else -tensor.untyped_storage().data_ptr()
