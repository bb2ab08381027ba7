"""From NVML readings to a machine. The readings are written from NVML's documentation; no GPU was read for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.errors import MachineError
from planner.machine import gpu_presets
from runtime.probe import read_machine
from runtime.readings import GpuReading, MigReading, PairReading, available_bytes, machine_of

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
    [
        ("0,1", [20, 23]),
        ("1,0", [23, 20]),
        ("1", [23]),
        ("GPU-1111", [23]),
        ("0,-1,1", [20]),
        ("0,7,1", [20]),
        ("1gpu0,0ampere", [23, 20]),
    ],
    ids=["both", "swapped", "one", "uuid prefix", "negative ends the list", "unknown ends the list", "digits lead"],
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


# -- MIG


def sliced(number: int, *free_gib: int) -> GpuReading:
    """A card with MIG on and instances of so much memory."""
    instances = tuple(
        MigReading(uuid=f"MIG-{number}{index}-aaaa", total_bytes=free * GIB, free_bytes=free * GIB)
        for index, free in enumerate(free_gib)
    )
    whole = card(number, name="NVIDIA A100-SXM4-80GB", free_gib=79)
    return replace(whole, has_mig=True, mig_instances=instances)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "MIG-00-aaaa"), ("MIG-01", "MIG-01-aaaa"), ("MIG-01,MIG-00", "MIG-01-aaaa"), ("0", "MIG-00-aaaa")],
    ids=["the first", "a named one", "only one of several", "the first of a named card"],
)
def test_a_process_sees_one_mig_instance_with_its_own_memory(visible: str | None, expected: str) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    (device,) = machine_of([sliced(0, 10, 20), card(1)], environment).devices
    assert device.uuid == expected
    assert device.memory_bytes == (10 if expected == "MIG-00-aaaa" else 20) * GIB
    assert device.kind is None and device.bandwidth_bytes_per_s is None


def test_a_whole_card_beside_a_sliced_one_can_be_chosen() -> None:
    (device,) = machine_of([sliced(0, 10), card(1)], {"CUDA_VISIBLE_DEVICES": "1"}).devices
    assert device.kind == "rtx4090"


def test_mig_without_instances_or_with_an_unknown_one_is_said() -> None:
    with pytest.raises(MachineError, match=r"has MIG on and no instance: make one with nvidia-smi mig"):
        machine_of([sliced(0)], {})
    with pytest.raises(MachineError, match=r"CUDA_VISIBLE_DEVICES='MIG-9' names no MIG instance"):
        machine_of([sliced(0, 10)], {"CUDA_VISIBLE_DEVICES": "MIG-9"})


# -- links


def pair(source: int, target: int, *, can_copy: bool = True, num_nvlinks: int = 0) -> PairReading:
    uuids = [f"GPU-{number}{number}{number}{number}-aaaa" for number in (source, target)]
    return PairReading(source=uuids[0], target=uuids[1], can_copy=can_copy, num_nvlinks=num_nvlinks)


def test_nvlinks_add_up_and_follow_the_numbers_that_cuda_gives() -> None:
    """Cards 0 and 1 are joined by four third-generation links: 100 GB/s; named the other way round they are swapped."""
    cards = [replace(card(number), nvlink_generation=3) for number in range(3)]
    pairs = [pair(0, 1, num_nvlinks=4), pair(1, 0, num_nvlinks=4), pair(0, 2), pair(2, 0), pair(1, 2), pair(2, 1)]
    links = machine_of(cards, {"CUDA_VISIBLE_DEVICES": "2,1,0"}, pairs).links
    assert {(link.source, link.target): link.bandwidth_bytes_per_s for link in links} == {
        ("cuda:1", "cuda:2"): 100e9,
        ("cuda:2", "cuda:1"): 100e9,
    }


def test_copies_without_peer_access_go_through_the_host_at_half_the_rate() -> None:
    (link,) = machine_of(PAIR, {}, [pair(0, 1, can_copy=False), pair(1, 0)]).links
    assert (link.source, link.target) == ("cuda:0", "cuda:1")
    assert link.bandwidth_bytes_per_s == pytest.approx(15.75e9 / 2, rel=1e-3)


def test_pairs_of_hidden_cards_are_left_out() -> None:
    pairs = [pair(0, 1, can_copy=False), pair(1, 0, can_copy=False)]
    assert machine_of(PAIR, {"CUDA_VISIBLE_DEVICES": "1"}, pairs).links == ()


def test_a_machine_without_a_driver_gets_one_clear_line() -> None:
    try:
        readings = read_machine().gpus
    except MachineError as problem:
        assert "no NVIDIA driver answers here" in str(problem)
        assert "--gpus 2x24GiB" in str(problem)
    else:
        assert all(reading.total_bytes >= reading.free_bytes > 0 for reading in readings)


def test_a_cards_link_to_the_host_is_its_lanes_at_the_best_generation() -> None:
    """Written from the specifications: 16 lanes of generation 4 carry 31.5 GB/s, 8 of generation 3 7.9 GB/s."""
    cards = [
        GpuReading(name="A", uuid="GPU-a", total_bytes=GIB, free_bytes=GIB, pcie_generation=4, pcie_lanes=16),
        GpuReading(name="A", uuid="GPU-b", total_bytes=GIB, free_bytes=GIB, pcie_generation=3, pcie_lanes=8),
        GpuReading(name="A", uuid="GPU-c", total_bytes=GIB, free_bytes=GIB),
    ]
    rates = [device.host_bandwidth_bytes_per_s for device in machine_of(cards, {}).devices]
    assert rates[0] == pytest.approx(31.5e9, rel=0.01) and rates[1] == pytest.approx(7.9e9, rel=0.01)
    assert rates[2] is None


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("MemTotal:  65536 kB\nMemFree:  10 kB\nMemAvailable:   131073 kB\n", 128 * 2**20),
        ("MemTotal:  65536 kB\n", None),
    ],
)
def test_what_the_host_has_free_is_what_linux_calls_available(text: str, num_bytes: int | None) -> None:
    assert available_bytes(text) == num_bytes
