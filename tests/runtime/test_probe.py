"""From NVML readings to a machine. The readings are written from NVML's documentation; no GPU was read for them."""

from __future__ import annotations

import pytest

from planner.errors import MachineError
from planner.machine import gpu_presets
from runtime.probe import GpuReading, machine_of, read_gpus

GIB = 2**30


def card(number: int, name: str = "NVIDIA GeForce RTX 4090", free_gib: int = 23) -> GpuReading:
    uuid = f"GPU-{number}{number}{number}{number}-aaaa"
    return GpuReading(name=name, uuid=uuid, total_bytes=24 * GIB, free_bytes=free_gib * GIB)


PAIR = [card(0, free_gib=20), card(1, free_gib=23)]
MIXED = [card(0), card(1, name="NVIDIA A100-SXM4-80GB", free_gib=79)]


def free_gib(environment: dict[str, str], readings: list[GpuReading] = PAIR) -> list[int]:
    return [device.memory_bytes // GIB for device in machine_of(readings, environment).devices]


def test_free_memory_is_planned_and_known_cards_bring_their_speed() -> None:
    first, second = machine_of(PAIR, {}).devices
    assert (first.memory_bytes, first.kind, first.uuid) == (20 * GIB, "rtx4090", "GPU-0000-aaaa")
    assert second.bandwidth_bytes_per_s == 1008e9


@pytest.mark.parametrize("kind", sorted(gpu_presets()))
def test_every_known_gpu_is_recognised_by_the_names_nvml_gives_it(kind: str) -> None:
    for name in gpu_presets()[kind]["nvml"]:
        assert machine_of([card(0, name=name)], {}).devices[0].kind == kind


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0,1", [20, 23]), ("1,0", [23, 20]), ("1", [23]), ("GPU-1111", [23]), ("0,-1,1", [20]), ("0,7,1", [20])],
    ids=["both", "swapped", "one", "uuid prefix", "negative ends the list", "unknown ends the list"],
)
def test_cuda_visible_devices_selects_and_orders(visible: str, expected: list[int]) -> None:
    assert free_gib({"CUDA_VISIBLE_DEVICES": visible}) == expected


@pytest.mark.parametrize("visible", ["", "-1", "0,0", "nonsense"])
def test_a_setting_that_hides_every_card_is_said(visible: str) -> None:
    with pytest.raises(MachineError, match=f"CUDA_VISIBLE_DEVICES={visible!r} hides all 2.*--gpus 2x24GiB"):
        machine_of(PAIR, {"CUDA_VISIBLE_DEVICES": visible})


def test_no_card_at_all_is_said() -> None:
    with pytest.raises(MachineError, match=r"no GPU to plan for: none is installed\. Describe the machine instead"):
        machine_of([], {})


def test_different_cards_need_the_bus_order_because_cuda_numbers_by_speed() -> None:
    with pytest.raises(MachineError, match=r"the cards differ .*Set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        machine_of(MIXED, {})
    assert free_gib({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, MIXED) == [23, 79]
    assert free_gib({"CUDA_VISIBLE_DEVICES": "GPU-1111,GPU-0000"}, MIXED) == [79, 23]


def test_a_machine_without_a_driver_gets_one_clear_line() -> None:
    try:
        readings = read_gpus()
    except MachineError as problem:
        assert "no NVIDIA driver answers here" in str(problem)
        assert "--gpus 2x24GiB" in str(problem)
    else:
        assert all(reading.total_bytes >= reading.free_bytes > 0 for reading in readings)
