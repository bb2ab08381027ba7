"""What must share a device and what is pinned: units, and every way to ask for the impossible."""

from __future__ import annotations

import pytest

from planner.constraints import Complaint, Constraints, Unit, units
from planner.errors import ConstraintError
from planner.graph import Flow, Fusion, ModuleGraph, ModuleGroup
from planner.machine import Machine
from planner.polynomial import constant

PAIR = Machine.parse("2x24GiB")
HARD = Fusion(op="torch.cat", operands=("vision_proj", "model.embed"), reason="features are joined here")
SOFT = Fusion(op="vision path", operands=("vit", "vision_proj"), reason="the encoder stays beside it", hard=False)
TIED = Fusion(op="tied weight", operands=("model.embed", "output"), reason="both hold one tensor")


def group(name: str, *modules: str) -> ModuleGroup:
    return ModuleGroup(id=name, modules=modules or (name,), role="decoder_layer", weight_bytes=1, num_parameters=1)


def toy(*fusions: Fusion, flows: tuple[Flow, ...] = ()) -> ModuleGraph:
    """vit 0, vision_proj 1, model.embed 2, model.layers.1 3, model.layers.10 4, output 5."""
    names = ("vit", "vision_proj", "model.embed", "model.layers.1", "model.layers.10", "output")
    return ModuleGraph(name="toy", dtype="float16", groups=tuple(map(group, names)), fusions=fusions, flows=flows)


def members(graph: ModuleGraph, constraints: Constraints) -> list[tuple[int, ...]]:
    return [unit.members for unit in units(graph, PAIR, constraints)]


def pinned(graph: ModuleGraph, **pins: int) -> dict[tuple[int, ...], int | None]:
    named = {name.replace("__", "."): device for name, device in pins.items()}
    return {unit.members: unit.pinned for unit in units(graph, PAIR, Constraints(pins=named))}


def refusal(graph: ModuleGraph, constraints: Constraints) -> str:
    with pytest.raises(ConstraintError) as caught:
        units(graph, PAIR, constraints)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_without_fusions_every_group_is_a_unit_of_its_own_in_execution_order() -> None:
    assert units(toy(), PAIR, Constraints()) == tuple(Unit(members=(i,)) for i in range(6))


def test_one_group_is_one_unit_and_none_are_none() -> None:
    assert units(ModuleGraph(name="one", dtype="float16", groups=(group("a"),)), PAIR, Constraints()) == (
        Unit(members=(0,)),
    )
    assert units(ModuleGraph(name="none", dtype="float16", groups=()), PAIR, Constraints()) == ()


MERGED: dict[str, tuple[tuple[Fusion, ...], bool, list[tuple[int, ...]]]] = {
    "neighbours": ((HARD,), False, [(0,), (1, 2), (3,), (4,), (5,)]),
    "fusions that share an operand chain up": ((HARD, SOFT), False, [(0, 1, 2), (3,), (4,), (5,)]),
    "the order of fusions is irrelevant": ((SOFT, HARD), False, [(0, 1, 2), (3,), (4,), (5,)]),
    "a soft fusion is lifted": ((HARD, SOFT), True, [(0,), (1, 2), (3,), (4,), (5,)]),
    "a hard one is not": ((HARD,), True, [(0,), (1, 2), (3,), (4,), (5,)]),
    "a member from elsewhere comes along": ((TIED,), False, [(0,), (1,), (2, 5), (3,), (4,)]),
    "everything at once": ((TIED, SOFT, HARD), False, [(0, 1, 2, 5), (3,), (4,)]),
    "a fusion of one": (
        (Fusion(op="x", operands=("vit",), reason="alone"),),
        False,
        [(0,), (1,), (2,), (3,), (4,), (5,)],
    ),
}


@pytest.mark.parametrize(("fusions", "split_vision", "expected"), MERGED.values(), ids=MERGED)
def test_fusions_merge_groups_into_units(
    fusions: tuple[Fusion, ...], split_vision: bool, expected: list[tuple[int, ...]]
) -> None:
    assert members(toy(*fusions), Constraints(split_vision=split_vision)) == expected


def test_a_pin_binds_the_unit_of_its_module() -> None:
    assert pinned(toy(HARD), vision_proj=1) == {(0,): None, (1, 2): 1, (3,): None, (4,): None, (5,): None}


def test_a_pin_of_a_parent_binds_everything_inside_and_nothing_that_merely_looks_alike() -> None:
    assert pinned(toy(), model=0) == {(0,): None, (1,): None, (2,): 0, (3,): 0, (4,): 0, (5,): None}
    assert pinned(toy(), model__layers__1=0)[(4,)] is None


def test_a_pin_of_any_module_of_a_group_binds_the_group() -> None:
    pair = ModuleGraph(name="pair", dtype="float16", groups=(group("a", "a.x", "b.y"), group("c")))
    (first, second) = units(pair, PAIR, Constraints(pins={"b.y": 1}))
    assert (first.pinned, second.pinned) == (1, None)


def test_the_root_pins_the_whole_model() -> None:
    assert {unit.pinned for unit in units(toy(), PAIR, Constraints(pins={"": 1}))} == {1}


def test_pins_that_agree_are_one_pin() -> None:
    assert pinned(toy(HARD, SOFT), vit=1, model__embed=1)[(0, 1, 2)] == 1


REFUSED_PINS: dict[str, tuple[dict[str, int], str]] = {
    "a device past the end": ({"vit": 2}, "pin vit=2 names a device that is not there: this machine has 2 (0 to 1)"),
    "a negative device": ({"vit": -1}, "pin vit=-1 names a device that is not there"),
    "a near module": ({"vitt": 0}, "pin vitt=0 names no module of toy: did you mean vit?"),
    "a layer that is not there": ({"model.layers.2": 0}, "names no module of toy: did you mean model.layers"),
    "a far module": (
        {"zzzzzz": 0},
        "names no module of toy: its top-level modules are model, output, vision_proj, vit",
    ),
    "a part of a group": ({"vit.encoder.layers.3": 0}, "pin vit.encoder.layers.3=0 names no module of toy"),
    "a parent and its child": (
        {"model": 0, "model.layers.1": 1},
        "pins model=0 and model.layers.1=1 contradict each other: both hold model.layers.1. Drop one.",
    ),
}


@pytest.mark.parametrize(("pins", "message"), REFUSED_PINS.values(), ids=REFUSED_PINS)
def test_a_pin_that_cannot_be_kept_is_refused(pins: dict[str, int], message: str) -> None:
    assert message in refusal(toy(), Constraints(pins=pins))


def test_a_pin_that_contradicts_a_colocation_is_refused_with_the_op_and_its_reason() -> None:
    text = refusal(toy(HARD), Constraints(pins={"vision_proj": 0, "model.embed": 1}))
    assert text == (
        "pins vision_proj=0, model.embed=1 contradict a co-location: these modules must share a device. "
        "torch.cat: features are joined here. Pin them to one device."
    )


def test_a_pin_that_contradicts_a_default_is_refused_with_the_way_to_lift_it() -> None:
    pins = {"vit": 0, "model.embed": 1}
    text = refusal(toy(HARD, SOFT), Constraints(pins=pins))
    assert "vision path: the encoder stays beside it" in text and "(or lift it: --split-vision)" in text
    lifted = units(toy(HARD, SOFT), PAIR, Constraints(pins=pins, split_vision=True))
    assert [(unit.members, unit.pinned) for unit in lifted[:2]] == [((0,), 0), ((1, 2), 1)]


def test_groups_listed_against_their_flow_are_refused() -> None:
    backward = Flow(tensor="x", producer="output", consumers=("vit",), phase="decode", num_bytes=constant(1))
    with pytest.raises(ValueError, match="toy lists vit before output, whose output it needs: list groups as they run"):
        units(toy(flows=(backward,)), PAIR, Constraints())


def test_a_group_may_read_what_it_made_itself() -> None:
    own = Flow(tensor="x", producer="vit", consumers=("vit",), phase="decode", num_bytes=constant(1))
    assert len(units(toy(flows=(own,)), PAIR, Constraints())) == 6


def test_everything_that_is_wrong_with_the_pins_is_said_at_once_the_worst_first() -> None:
    pins = {"model": 0, "model.layers": 1, "vision_proj": 1, "nose": 0, "vit": 7}
    text = refusal(toy(HARD), Constraints(pins=pins))
    first, *rest = text.splitlines()
    assert first == "4 problems with the pins:"
    starts = [
        "  pin nose=0 names no module of toy",
        "  pin vit=7 names a device that is not there",
        "  pins model=0 and model.layers=1 contradict each other: both hold model.layers.1 and 1 more. Drop one.",
        "  pins vision_proj=1, model=0 contradict a co-location",
    ]
    assert all(line.startswith(start) for line, start in zip(rest, starts, strict=True))


def test_what_the_caller_found_is_said_with_what_the_graph_shows_and_the_worst_first() -> None:
    unclear = (Complaint(True, "pins vit=0 and vit=1 contradict each other"), Complaint(False, "there is no device 9"))
    pins = {"nothing": 0, "model.layers": 0, "model.layers.1": 1}
    first, *lines = refusal(toy(), Constraints(pins=pins, unclear=unclear)).splitlines()
    assert first == "4 problems with the pins:"
    assert [text for line in lines for text in ("no device 9", "no module", "vit=0", "layers=0") if text in line] == [
        "no device 9",
        "no module",
        "vit=0",
        "layers=0",
    ]
