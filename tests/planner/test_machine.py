"""Machines: the shorthand of --gpus, machine files, and what is said about those that make no sense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ConstraintError, MachineError
from planner.machine import CONTEXT_BYTES, RESERVE_BYTES, Device, Link, Machine, describe, gpu_presets
from planner.textfile import dump_mapping
from planner.units import GIB, MIB

RTX4090 = round(23.64 * GIB)
A100_80G = round(79.15 * GIB)

SHORTHAND: dict[str, tuple[str, list[tuple[str, int]]]] = {
    "one device": ("24GiB", [("cuda:0", 24 * GIB)]),
    "a count": ("2x24GiB", [("cuda:0", 24 * GIB), ("cuda:1", 24 * GIB)]),
    "a count of one": ("1x24GiB", [("cuda:0", 24 * GIB)]),
    "a decimal size": ("24GB", [("cuda:0", 24 * 10**9)]),
    "unequal": ("24GiB,12GiB", [("cuda:0", 24 * GIB), ("cuda:1", 12 * GIB)]),
    "joined by plus": ("24GiB+12GiB", [("cuda:0", 24 * GIB), ("cuda:1", 12 * GIB)]),
    "plus and comma": ("1GiB+2GiB,3GiB", [("cuda:0", GIB), ("cuda:1", 2 * GIB), ("cuda:2", 3 * GIB)]),
    "counts and sizes": ("2x1GiB,2GiB", [("cuda:0", GIB), ("cuda:1", GIB), ("cuda:2", 2 * GIB)]),
    "a preset": ("rtx4090", [("cuda:0", RTX4090)]),
    "a preset in capitals": ("RTX4090", [("cuda:0", RTX4090)]),
    "a counted preset and another": (
        "2xrtx4090,a100-80g",
        [(f"cuda:{i}", RTX4090) for i in (0, 1)] + [("cuda:2", A100_80G)],
    ),
    "a preset and a size": ("rtx4090,8GiB", [("cuda:0", RTX4090), ("cuda:1", 8 * GIB)]),
    "blanks": (" 2 x 24 GiB , 8GiB ", [("cuda:0", 24 * GIB), ("cuda:1", 24 * GIB), ("cuda:2", 8 * GIB)]),
    "one named host": ("a=2x1GiB", [("a/cuda:0", GIB), ("a/cuda:1", GIB)]),
    "indices count from 0 on each host": (
        "a=2x1GiB/b=2GiB,3GiB",
        [("a/cuda:0", GIB), ("a/cuda:1", GIB), ("b/cuda:0", 2 * GIB), ("b/cuda:1", 3 * GIB)],
    ),
    "the most of one kind": ("64x1GiB", [(f"cuda:{i}", GIB) for i in range(64)]),
}


@pytest.mark.parametrize(("spec", "expected"), SHORTHAND.values(), ids=SHORTHAND)
def test_shorthand_names_devices_and_sizes(spec: str, expected: list[tuple[str, int]]) -> None:
    machine = Machine.parse(spec)
    assert [(device.name, device.memory_bytes) for device in machine.devices] == expected


REFUSED_SHORTHAND = {
    "empty": ("", "--gpus '' has an empty item: write 2x24GiB or rtx4090,a100-80g"),
    "an empty item": ("24GiB,,8GiB", "has an empty item"),
    "a trailing comma": ("24GiB,", "has an empty item"),
    "no devices": ("0x24GiB", "--gpus '0x24GiB' asks for 0 devices in '0x24GiB': 1 to 64"),
    "too many devices": ("65x24GiB", "asks for 65 devices in '65x24GiB': 1 to 64"),
    "no unit": ("24", "'24' has no unit: write 24GiB (2**30 bytes) or 24GB (10**9 bytes)"),
    "a count without a size": ("2x", "'2x' has the unknown unit 'x'"),
    "an unknown unit": ("2x24GX", "'24GX' has the unknown unit 'GX'"),
    "no memory": ("0GiB", "--gpus 0GiB has 0GiB of memory: a device has more than zero bytes"),
    "a near preset": ("rtx4091", "names the unknown GPU 'rtx4091': did you mean rtx4090"),
    "a far preset": ("voodoo", "names the unknown GPU 'voodoo': known are t4, v100-16g,"),
    "a size works too": ("voodoo", "A size works too, such as 24GiB."),
    "a negative count": ("-1x24GiB", "names the unknown GPU '-1x24GiB'"),
    "a host without a name": (
        "a=24GiB/24GiB",
        "host '24GiB' in 'a=24GiB/24GiB' has no name: write a=2x24GiB/b=2x24GiB",
    ),
    "a trailing slash": ("a=24GiB/", "host '' in 'a=24GiB/' has no name"),
    "a host twice": ("a=24GiB/a=24GiB", "--gpus a=24GiB/a=24GiB: devices named twice: a/cuda:0"),
    "a host without devices": ("a=/b=24GiB", "has an empty item"),
}


@pytest.mark.parametrize(("spec", "message"), REFUSED_SHORTHAND.values(), ids=REFUSED_SHORTHAND)
def test_shorthand_without_a_meaning_is_refused(spec: str, message: str) -> None:
    with pytest.raises(MachineError) as caught:
        Machine.parse(spec)
    assert message in str(caught.value) and caught.value.exit_code == 3


def test_hosts_are_listed_in_order_of_appearance() -> None:
    assert Machine.parse("b=1GiB/a=1GiB").hosts == ("b", "a")
    assert Machine.parse("2x1GiB").hosts == ("",)


@pytest.mark.parametrize("name", gpu_presets())
def test_every_preset_is_a_device_of_known_speed_within_its_nominal_size(name: str) -> None:
    (device,) = Machine.parse(name).devices
    assert device.kind == name and device.bandwidth_bytes_per_s and device.flops_per_s
    assert 7 * GIB < device.memory_bytes < 144 * GIB


def test_a_device_given_by_size_alone_has_no_speed() -> None:
    (device,) = Machine.parse("24GiB").devices
    assert (device.kind, device.bandwidth_bytes_per_s, device.flops_per_s) == (None, None, None)


def test_context_and_reserve_have_defaults_that_can_be_changed_to_zero() -> None:
    machine = Machine.parse("2x24GiB")
    assert {(d.context_bytes, d.reserve_bytes) for d in machine.devices} == {(500 * MIB, 512 * MIB)}
    bare = machine.with_overheads(context_bytes=0, reserve_bytes=0)
    assert {(d.context_bytes, d.reserve_bytes) for d in bare.devices} == {(0, 0)}
    assert machine.with_overheads(reserve_bytes=7).devices[1].context_bytes == CONTEXT_BYTES
    assert machine.with_overheads() == machine


def test_a_limit_lowers_memory_and_never_raises_it() -> None:
    limited = Machine.parse("3x24GiB").limited({0: 10 * GIB, 2: 30 * GIB})
    assert [device.memory_bytes // GIB for device in limited.devices] == [10, 24, 24]


@pytest.mark.parametrize(
    ("spec", "position", "range_text"),
    [("2x24GiB", 2, "devices 0 to 1"), ("24GiB", 1, "only device 0"), ("2x24GiB", -1, "devices 0 to 1")],
    ids=["past the end", "past the only one", "negative"],
)
def test_a_limit_on_a_device_that_is_not_there_is_refused(spec: str, position: int, range_text: str) -> None:
    with pytest.raises(ConstraintError, match=f"--max-memory names device {position}: this machine has {range_text}"):
        Machine.parse(spec).limited({position: GIB})


DESCRIBED = {
    "a size": ("24GiB", "cuda:0 (24.00 GiB)"),
    "a preset": ("rtx4090", "cuda:0 (rtx4090, 23.64 GiB)"),
    "on a host": ("a=24GiB", "a/cuda:0 (24.00 GiB)"),
}


@pytest.mark.parametrize(("spec", "text"), DESCRIBED.values(), ids=DESCRIBED)
def test_a_device_is_described_by_name_kind_and_size(spec: str, text: str) -> None:
    assert describe(Machine.parse(spec).devices[0]) == text


MISUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no device": ({"devices": ()}, "a machine needs at least one device"),
    "a name twice": (
        {"devices": (Device(index=0, memory_bytes=1), Device(index=0, memory_bytes=2))},
        "devices named twice: cuda:0",
    ),
    "a link given twice": (
        {
            "devices": (Device(index=0, memory_bytes=1), Device(index=1, memory_bytes=1)),
            "links": (Link(source="cuda:0", target="cuda:1", bandwidth_bytes_per_s=1.0),) * 2,
        },
        "links given twice: cuda:0 -> cuda:1",
    ),
    "a link to nowhere": (
        {
            "devices": (Device(index=0, memory_bytes=1),),
            "links": (Link(source="cuda:0", target="cuda:9", bandwidth_bytes_per_s=1.0),),
        },
        "links name unknown devices cuda:9: known are cuda:0",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSED.values(), ids=MISUSED)
def test_a_machine_that_contradicts_itself_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Machine(**arguments)


@pytest.mark.parametrize("field", ["memory_bytes", "context_bytes", "reserve_bytes"])
def test_a_device_of_negative_size_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="cuda:0 has a negative size: bytes are zero or more"):
        Device(**{"index": 0, "memory_bytes": 1, field: -1})


# -- files


def saved(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "machine.yaml"
    path.write_text(dump_mapping(content))
    return path


def test_a_file_of_one_size_is_a_machine_of_one_device(tmp_path: Path) -> None:
    assert Machine.load(saved(tmp_path, {"devices": [{"memory": "24GiB"}]})) == Machine.parse("24GiB")


def test_a_file_may_name_presets_and_override_what_they_say(tmp_path: Path) -> None:
    entries = [{"kind": "rtx4090"}, {"kind": "rtx4090", "memory": "20GiB", "reserve": "0", "context": "1GiB"}]
    first, second = Machine.load(saved(tmp_path, {"devices": entries})).devices
    assert first == Machine.parse("rtx4090").devices[0]
    assert (second.index, second.memory_bytes, second.reserve_bytes, second.context_bytes) == (1, 20 * GIB, 0, GIB)
    assert second.bandwidth_bytes_per_s == first.bandwidth_bytes_per_s


def test_a_card_of_unknown_kind_needs_its_memory_only(tmp_path: Path) -> None:
    entry = {"kind": "b300", "memory": "250GiB", "bandwidth": "8000GB/s", "flops": 2.5e15}
    (device,) = Machine.load(saved(tmp_path, {"devices": [entry]})).devices
    assert (device.kind, device.bandwidth_bytes_per_s, device.flops_per_s) == ("b300", 8 * 10**12, 2.5e15)


def test_indices_in_a_file_count_on_from_the_last_on_the_same_host(tmp_path: Path) -> None:
    entries = [
        {"memory": "1GiB", "host": "a", "index": 3},
        {"memory": "1GiB", "host": "a"},
        {"memory": "1GiB", "host": "b"},
    ]
    machine = Machine.load(saved(tmp_path, {"devices": entries}))
    assert [device.name for device in machine.devices] == ["a/cuda:3", "a/cuda:4", "b/cuda:0"]


def test_links_in_a_file_are_read(tmp_path: Path) -> None:
    link = {"source": "cuda:0", "target": "cuda:1", "bandwidth_bytes_per_s": 5e10, "latency_s": 1e-5}
    machine = Machine.load(saved(tmp_path, {"devices": [{"memory": "1GiB"}] * 2, "links": [link]}))
    assert machine.links == (Link(source="cuda:0", target="cuda:1", bandwidth_bytes_per_s=5e10, latency_s=1e-5),)


def test_a_link_that_is_not_allowed_needs_no_bandwidth(tmp_path: Path) -> None:
    link = {"source": "cuda:0", "target": "cuda:1", "allowed": False}
    machine = Machine.load(saved(tmp_path, {"devices": [{"memory": "1GiB"}] * 2, "links": [link]}))
    assert not machine.links[0].allowed
    assert Machine.from_dict(machine.to_dict()) == machine


@pytest.mark.parametrize(
    ("source", "bandwidth", "message"),
    [
        ("cuda:1", 1e9, "a link leads from cuda:1 to itself"),
        ("cuda:0", 0.0, r"cuda:0 -> cuda:1 has 0.0 bytes/s and 0.0 s of latency: a rate is above zero"),
        ("cuda:0", float("nan"), "has nan bytes/s"),
    ],
    ids=["itself", "zero", "nan"],
)
def test_a_link_that_makes_no_sense_is_refused(source: str, bandwidth: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Link(source=source, target="cuda:1", bandwidth_bytes_per_s=bandwidth)


def test_a_machine_keeps_the_links_between_the_devices_that_are_left() -> None:
    links = [Link(source=f"cuda:{a}", target=f"cuda:{b}", bandwidth_bytes_per_s=1e9) for a, b in ((0, 1), (1, 2))]
    machine = Machine(devices=Machine.parse("3x8GiB").devices, links=tuple(links)).only([1, 2])
    assert [device.name for device in machine.devices] == ["cuda:1", "cuda:2"] and machine.links == (links[1],)


REFUSED_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "no devices": ({"links": []}, "has no devices: give a list `devices:` with a memory or kind for each"),
    "an empty list": ({"devices": []}, "has no devices"),
    "a mapping of devices": ({"devices": {"a": "24GiB"}}, "has no devices"),
    "a bare size": ({"devices": ["24GiB"]}, "devices[0] is '24GiB', not a mapping with memory or kind"),
    "an unknown key at the top": (
        {"devices": [{"memory": "1GiB"}], "gpus": 1},
        "has unknown keys gpus: known are devices",
    ),
    "an unknown key of a device": (
        {"devices": [{"memory": "1GiB"}, {"memory": "1GiB", "mem": 1}]},
        "devices[1] has unknown keys mem: known are bandwidth, bandwidth_fraction, context, flops, flops_fraction,",
    ),
    "an unknown kind": (
        {"devices": [{"kind": "b300"}]},
        "devices[0] has the unknown kind 'b300' and no memory: known are",
    ),
    "neither memory nor kind": ({"devices": [{"index": 0}]}, "devices[0] has no memory: write memory: 24GiB, or kind"),
    "memory without a unit": ({"devices": [{"memory": 24}]}, "devices[0], memory: '24' has no unit"),
    "no memory left": ({"devices": [{"memory": "0GiB"}]}, "devices[0] has 0GiB of memory: a device has more than zero"),
    "a bad reserve": (
        {"devices": [{"memory": "1GiB", "reserve": "much"}]},
        "devices[0], reserve: 'much' is not a size",
    ),
    "a bad speed": ({"devices": [{"memory": "1GiB", "flops": "fast"}]}, "devices[0], flops: could not convert"),
    "a name twice": ({"devices": [{"memory": "1GiB"}, {"memory": "1GiB", "index": 0}]}, "devices named twice: cuda:0"),
    "a link without a target": (
        {"devices": [{"memory": "1GiB"}], "links": [{"source": "cuda:0"}]},
        "links[0] is {'source': 'cuda:0'}: a link has source and target (device names) and bandwidth_bytes_per_s",
    ),
    "a link that is text": ({"devices": [{"memory": "1GiB"}], "links": ["nvlink"]}, "links[0] is 'nvlink'"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED_FILES.values(), ids=REFUSED_FILES)
def test_a_machine_file_without_a_meaning_is_refused_naming_the_entry(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path, content)
    with pytest.raises(MachineError) as caught:
        Machine.load(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


SPECS = ["24GiB", "2x24GiB", "24GB,1234B", "rtx4090,a100-80g", "a=2xh200/b=4x8GiB", ",".join(gpu_presets())]


@pytest.mark.parametrize("spec", SPECS)
def test_a_machine_survives_being_written_down(spec: str, tmp_path: Path) -> None:
    machine = Machine.parse(spec)
    assert Machine.load(saved(tmp_path, machine.to_dict())) == machine


DEVICES = st.builds(
    Device,
    index=st.integers(0, 99),
    host=st.sampled_from(["", "a", "b"]),
    kind=st.sampled_from([None, "rtx4090", "b300"]),
    uuid=st.sampled_from([None, "GPU-0123"]),
    memory_bytes=st.integers(1, 2**45),
    context_bytes=st.integers(0, 2**40),
    reserve_bytes=st.integers(0, 2**40),
    flops_per_s=st.floats(1, 1e18),
    bandwidth_bytes_per_s=st.integers(1, 10**4).map(lambda gigabytes: gigabytes * 10**9),
)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(DEVICES, min_size=1, max_size=4, unique_by=lambda device: device.name))
def test_any_devices_survive_being_written_down(devices: list[Device]) -> None:
    pairs = zip(devices, devices[1:], strict=False)
    links = [Link(source=a.name, target=b.name, bandwidth_bytes_per_s=1e9, allowed=b.index > 1) for a, b in pairs]
    machine = Machine(devices=tuple(devices), links=tuple(links))
    assert Machine.from_dict(machine.to_dict()) == machine


def test_the_defaults_are_the_documented_ones() -> None:
    assert (CONTEXT_BYTES, RESERVE_BYTES) == (500 * MIB, 512 * MIB)


@pytest.mark.parametrize(
    "spec", ["2x24GiB", "24GiB,12GiB", "2xrtx4090,a100-80g", "rtx4090,24GiB,rtx4090", "a=2x24GiB/b=l4"]
)
def test_a_machines_shorthand_is_what_it_was_parsed_from(spec: str) -> None:
    assert Machine.parse(spec).spec == spec
    assert Machine.parse(spec).with_overheads(context_bytes=0).spec == spec


def test_a_machine_that_shorthand_cannot_say_has_none() -> None:
    machine = Machine.parse("2x24GiB")
    link = Link(source="cuda:0", target="cuda:1", bandwidth_bytes_per_s=1e9)
    assert replace(machine, links=(link,)).spec is None
    assert machine.only([1]).spec is None
    assert Machine.parse("rtx4090").limited({0: GIB}).spec is None


def test_the_hosts_memory_and_links_are_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text("host_memory: 64GiB\ndevices:\n- {memory: 24GiB, host_bandwidth: 25GB/s}\n- kind: rtx4090\n")
    machine = Machine.load(path)
    assert machine.host_memory_bytes == 64 * GIB
    assert [device.host_bandwidth_bytes_per_s for device in machine.devices] == [25e9, None]
    assert Machine.from_dict(machine.to_dict()) == machine
    assert machine.only([0]).host_memory_bytes == 64 * GIB
    assert "host_memory" not in Machine.parse("24GiB").to_dict()


def test_a_host_memory_without_a_unit_is_refused() -> None:
    with pytest.raises(MachineError, match=r"machine, host_memory: '64'"):
        Machine.from_dict({"devices": [{"memory": "24GiB"}], "host_memory": 64})
