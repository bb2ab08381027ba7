"""The GPUs of this machine, by NVML: free memory without creating a CUDA context, which costs hundreds of MiB a card.

Only reading is here; what the readings mean is in `runtime.readings`, which can be tested without a driver.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count, permutations
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from planner.errors import MachineError
from planner.machine import Machine
from runtime.readings import ADVICE, GpuReading, MigReading, PairReading, available_bytes, machine_of

Answer = TypeVar("Answer")

MEMINFO = Path("/proc/meminfo")
"""Linux's own account of its memory."""

P2P_READ, P2P_WRITE, P2P_OK = 0, 1, 0
"""NVML's indices and status by value: the binding's own name for the first is a tuple (a stray comma)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """Every card in PCI order, and every ordered pair of them about which NVML knows something."""

    gpus: tuple[GpuReading, ...]
    pairs: tuple[PairReading, ...]


def probe_machine() -> Machine:
    """The visible GPUs, their free memory and their links, numbered as CUDA numbers them; and what the host has free.

    Raises: MachineError when there is no driver, no GPU, or none is visible.
    """
    readings = read_machine()
    machine = machine_of(readings.gpus, os.environ, readings.pairs)
    return replace(machine, host_memory_bytes=available_bytes(MEMINFO.read_text()) if MEMINFO.exists() else None)


def read_machine() -> Readings:
    """Every card that NVML lists, and what connects them.

    Raises: MachineError naming the NVML error, or the card that failed.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        raise MachineError(f"no NVIDIA driver answers here (NVML: {problem}). {ADVICE}") from problem
    try:
        handles = [_handle(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(_read_gpu(index, handle) for index, handle in enumerate(handles))
        return Readings(gpus=gpus, pairs=tuple(_read_pairs(gpus, handles)))
    finally:
        pynvml.nvmlShutdown()


def _handle(index: int) -> Any:
    try:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as problem:
        raise MachineError(f"GPU {index} does not answer (NVML: {problem}). {ADVICE}") from problem


def _read_gpu(index: int, handle: Any) -> GpuReading:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    except pynvml.NVMLError as problem:
        raise MachineError(f"GPU {index} does not answer (NVML: {problem}). {ADVICE}") from problem
    has_mig = _if_supported(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0], 0) == 1
    links = _active_links(handle)
    return GpuReading(
        name=_text(name),
        uuid=_text(uuid),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        has_mig=has_mig,
        mig_instances=tuple(_read_instances(handle)) if has_mig else (),
        pcie_generation=_if_supported(lambda: int(pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)), None),
        pcie_lanes=_if_supported(lambda: int(pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)), None),
        nvlink_generation=_if_supported(lambda: int(pynvml.nvmlDeviceGetNvLinkVersion(handle, links[0])), None)
        if links
        else None,
    )


def _read_instances(handle: Any) -> list[MigReading]:
    """Instances by index; NVML says NotFound where there is a gap."""
    found = []
    for index in range(_if_supported(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0)):
        instance = _if_supported(lambda at=index: pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, at), None)
        if instance is not None:
            memory = pynvml.nvmlDeviceGetMemoryInfo(instance)
            uuid = _text(pynvml.nvmlDeviceGetUUID(instance))
            found.append(MigReading(uuid=uuid, total_bytes=int(memory.total), free_bytes=int(memory.free)))
    return found


def _read_pairs(gpus: tuple[GpuReading, ...], handles: list[Any]) -> list[PairReading]:
    """Peer access and NVLinks; cards whose links all end in switches reach each other over all of them."""
    bus_ids = [_bus_id(pynvml.nvmlDeviceGetPciInfo(handle)) for handle in handles]
    remotes = [_remote_bus_ids(handle) for handle in handles]
    found = []
    for source, target in permutations(range(len(handles)), 2):
        status = [_peer_status(handles[source], handles[target], index) for index in (P2P_READ, P2P_WRITE)]
        if None in status:
            continue
        switched = sum(n for bus_id, n in remotes[source].items() if bus_id not in bus_ids)
        reached = sum(n for bus_id, n in remotes[target].items() if bus_id not in bus_ids)
        found.append(
            PairReading(
                source=gpus[source].uuid,
                target=gpus[target].uuid,
                can_copy=all(one == P2P_OK for one in status),
                num_nvlinks=remotes[source][bus_ids[target]] + min(switched, reached),
            )
        )
    return found


def _peer_status(source: Any, target: Any, index: int) -> int | None:
    return _if_supported(lambda: int(pynvml.nvmlDeviceGetP2PStatus(source, target, index)), None)


def _active_links(handle: Any) -> list[int]:
    """Link numbers that are up; NVML refuses the first number that the card does not have."""
    found = []
    for link in count():
        state = _if_supported(lambda at=link: pynvml.nvmlDeviceGetNvLinkState(handle, at), None)
        if state is None:
            return found
        if state == pynvml.NVML_FEATURE_ENABLED:
            found.append(link)
    raise AssertionError("unreachable: no card has endless links")


def _remote_bus_ids(handle: Any) -> Counter[str]:
    """PCI addresses of what the card's active links lead to, with the number of links to each."""
    found = (_if_supported(lambda at=link: _remote(handle, at), None) for link in _active_links(handle))
    return Counter(bus_id for bus_id in found if bus_id is not None)


def _remote(handle: Any, link: int) -> str:
    return _bus_id(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link))


def _bus_id(info: Any) -> str:
    """Comparable text: NVML pads the domain differently in its two fields."""
    return _text(info.busId).lower().lstrip("0:")


def _if_supported(ask: Callable[[], Answer], otherwise: Answer) -> Answer:
    """The answer, or `otherwise` where this card or driver has none."""
    try:
        return ask()
    except (
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_InvalidArgument,
        pynvml.NVMLError_NotFound,
        pynvml.NVMLError_FunctionNotFound,
        pynvml.NVMLError_NoPermission,
    ):
        return otherwise


def _text(value: str | bytes) -> str:
    """NVML's bindings gave bytes before version 11.5."""
    return value.decode() if isinstance(value, bytes) else value
