"""An estimate that rests on a default says so, and one that rests on measurements does not."""

from __future__ import annotations

from dataclasses import replace

from planner import Machine, Plan, Workload
from planner.defaults import defaults_of
from planner.machine import Link
from vlm.model import find_model
from vlm.planning import plan_for

MODEL = find_model("internlm2-7b")
MIB = 2**20


def planned(machine: Machine) -> Plan:
    return plan_for(MODEL, machine, Workload())


def test_a_card_of_the_table_has_datasheet_rates_and_a_usual_context() -> None:
    assert list(defaults_of(planned(Machine.parse("a100-40g")))) == [
        "0.49 GiB of CUDA context a GPU",
        "13 us a kernel",
        "75% of bandwidth",
        "68% of FLOP/s",
    ]


def test_a_size_has_no_times_that_could_rest_on_anything() -> None:
    assert list(defaults_of(planned(Machine.parse("24GiB")))) == ["0.49 GiB of CUDA context a GPU"]


def test_links_that_nobody_named_are_assumed() -> None:
    assert "PCI Express 3.0 x16 between GPUs" in defaults_of(planned(Machine.parse("2xl4")))
    assert "10 Gbit/s between hosts" in defaults_of(planned(Machine.parse("a=l4/b=l4")))


def test_a_context_that_somebody_gave_is_no_default_whatever_its_size() -> None:
    sizes = {"memory": "24GiB", "context": "500MiB"}
    for machine in (
        Machine.parse("24GiB").with_overheads(context_bytes=500 * MIB),
        Machine.from_dict({"devices": [sizes]}),
    ):
        plan = planned(machine)
        assert list(defaults_of(plan)) == []
        assert list(defaults_of(Plan.from_dict(plan.to_dict()))) == []
    assert list(defaults_of(Plan.from_dict(planned(Machine.parse("24GiB")).to_dict())))


def test_a_profile_leaves_nothing_to_defaults() -> None:
    machine = Machine.parse("2xl4")
    measured = {"context_bytes": 400 * MIB, "launch_s": 1e-5, "bandwidth_fraction": 1.0, "flops_fraction": 1.0}
    devices = tuple(replace(device, **measured) for device in machine.devices)
    ends = [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")]
    links = tuple(Link(source=source, target=target, bandwidth_bytes_per_s=1e10) for source, target in ends)
    assert list(defaults_of(planned(Machine(devices=devices, links=links)))) == []
