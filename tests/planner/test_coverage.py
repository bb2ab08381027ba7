"""What follows from names alone: renames, text prefixes, and the order of a set."""

from __future__ import annotations

import pytest

from planner.diagnosis.coverage import ModelNames, coverage_findings, renames, stale_entries, stranded, uncovered
from planner.diagnosis.diagnosis import Crossing
from planner.diagnosis.map_file import GivenMap, given_map
from planner.diagnosis.map_hazards import (
    has_stable_order,
    launcher_findings,
    main_device,
    offload_findings,
    order_findings,
    peer_findings,
)
from planner.machine import Link, Machine


def names_with(*parameters: str) -> ModelNames:
    modules = {"": None}
    for name in parameters:
        segments = name.split(".")[:-1]
        modules |= {".".join(segments[:length]): None for length in range(1, len(segments) + 1)}
    return ModelNames(modules=frozenset(modules), parameters=dict.fromkeys(parameters, 4), buffers={})


NEW_NAMES = names_with(
    *(f"model.language_model.layers.{i}.weight" for i in range(3)),
    *(f"model.vision_tower.layers.{i}.weight" for i in range(3)),
    *("model.language_model.embed_tokens.weight", "model.vision_tower.patch.weight", "lm_head.weight"),
)


def test_prefixes_that_a_refactor_moved_are_found_for_each_tower() -> None:
    old = {
        **{f"language_model.model.layers.{i}": 1 for i in range(3)},
        **{f"vision_tower.layers.{i}": 0 for i in range(3)},
        **{"language_model.model.embed_tokens": 0, "language_model.lm_head": 1, "vision_tower.patch": 0},
    }
    assert renames(given_map(old), NEW_NAMES) == {
        **{f"language_model.model.layers.{i}": f"model.language_model.layers.{i}" for i in range(3)},
        **{f"vision_tower.layers.{i}": f"model.vision_tower.layers.{i}" for i in range(3)},
        "language_model.model.embed_tokens": "model.language_model.embed_tokens",
        "language_model.lm_head": "lm_head",
        "vision_tower.patch": "model.vision_tower.patch",
    }


def test_a_name_that_could_be_either_tower_is_not_renamed() -> None:
    given = given_map({"encoder.layers.0": 0})
    assert stale_entries(given, NEW_NAMES) == ["encoder.layers.0"]
    assert renames(given, NEW_NAMES) == {}


def test_two_entries_are_never_renamed_to_one_module() -> None:
    assert renames(given_map({"a.lm_head": 0, "b.lm_head": 1}), NEW_NAMES) == {}


def test_tensors_without_an_entry_are_all_listed() -> None:
    given = given_map({"model": 0})
    assert uncovered(given, NEW_NAMES) == ("lm_head.weight",)
    assert uncovered(given_map({"": 0}), NEW_NAMES) == ()


def test_a_non_persistent_buffer_without_an_entry_only_may_fail() -> None:
    names = ModelNames(
        modules=frozenset({"", "layer", "rotary"}),
        parameters={"layer.weight": 4},
        buffers={"rotary.inv_freq": 4},
        non_persistent=frozenset({"rotary.inv_freq"}),
    )
    (finding,) = coverage_findings(given_map({"layer": 0}), names, home=0)
    assert (finding.severity, finding.hazard) == ("may fail", "rope")
    assert finding.evidence[0] == "rotary"


@pytest.mark.parametrize(
    ("devices", "main", "stable"),
    [([0, 1], 0, True), ([1, 2], 1, True), ([1, 8], 8, True), (["cuda:1", "cuda:0"], 1, False), (["cuda:1"], 1, True)],
)
def test_the_main_device_is_the_first_of_a_set(devices: list[int | str], main: int, stable: bool) -> None:
    given = given_map({f"layers.{i}": device for i, device in enumerate(devices)})
    assert main_device(given) == main
    assert has_stable_order(given) is stable
    assert bool(list(order_findings(given, main))) is (not stable or main != min(given.gpus))


def test_the_main_device_of_an_offloaded_map_is_its_gpu() -> None:
    assert main_device(given_map({"a": "cpu", "b": 3})) == 3
    assert main_device(given_map({"a": "cpu", "b": "disk"})) == 0


@pytest.mark.parametrize(
    ("placement", "left"),
    [
        ({"model.table": "cpu", "model.layers": 0, "scale": 0}, ("model.table",)),
        ({"model.table": "disk", "model": 1, "scale": 0}, ()),
        ({"model.table": "cpu", "model.layers": 0, "scale": "cpu"}, ("model.table",)),
        ({"model.table": "cpu", "model.layers": "cpu", "scale": "cpu"}, ()),
    ],
    ids=["no hook around", "a hook around", "the root's own", "no GPU"],
)
def test_a_bare_tensor_off_the_gpus_is_stranded_where_no_hook_holds_it(
    placement: dict[str, int | str], left: tuple[str, ...]
) -> None:
    names = names_with("model.table", "model.layers.weight", "scale")
    assert stranded(placement, names) == left


def test_a_map_without_a_gpu_is_told_so_and_copies_nothing() -> None:
    (finding,) = offload_findings(given_map({"": "cpu"}), 1024)
    assert finding.title == "no GPU is used: everything stays on cpu"
    (finding,) = offload_findings(given_map({"a": 0, "b": "cpu"}), 1024)
    assert finding.title == "1.0 KiB of weights stay on cpu"


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "\u00b2"}, False),
        ({"WORLD_SIZE": "x"}, False),
        ({"WORLD_SIZE": "8", "RANK": "2"}, True),
    ],
)
def test_only_several_processes_make_a_spanning_map_fail(environment: dict[str, str], warned: bool) -> None:
    assert bool(list(launcher_findings(two_gpus(), environment))) is warned


def test_pairs_without_a_link_or_with_a_forbidden_one_are_named_where_links_are_known() -> None:
    machine = Machine.parse("4x24GiB")
    links = (
        Link(source="cuda:0", target="cuda:1", bandwidth_bytes_per_s=3e10),
        Link(source="cuda:0", target="cuda:3", bandwidth_bytes_per_s=3e10, allowed=False),
    )
    crossings = [
        Crossing(source="cuda:0", target=f"cuda:{target}", phase="decode", num_bytes=2048, num_copies=1)
        for target in (1, 2, 3)
    ]
    assert list(peer_findings(machine, crossings)) == []
    missing, forbidden = peer_findings(Machine(devices=machine.devices, links=links), crossings)
    assert (missing.severity, missing.title) == ("wasteful", "cuda:0 -> cuda:2 has no direct link")
    assert (forbidden.severity, forbidden.hazard) == ("may fail", "p2p")
    assert forbidden.title == "cuda:0 -> cuda:3 is a link that is not allowed"
    assert "2.0 KiB" in forbidden.evidence[0]


def two_gpus() -> GivenMap:
    return given_map({"a": 0, "b": 1})
