"""What is said when nothing fits: numbers that add up, and advice that was tried."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from planner.cli.main import main
from planner.errors import InfeasibleError
from planner.graph import ModuleGraph, ModuleGroup
from planner.machine import Device, Machine
from planner.memory import WORKSPACE_BYTES
from planner.plan import Plan
from planner.polynomial import Quantities
from planner.problem import Problem
from planner.shortfall import MAX_EXTRA_DEVICES, infeasible
from planner.solve import chain_dp
from planner.units import GIB, MIB
from planner.workload import Workload
from vlm.model import find_model
from vlm.planning import plan_for

COMPOSER = find_model("internlm-xcomposer2-vl-7b")


def toy(*weights_gib: int, kv_mib: int = 0) -> ModuleGraph:
    """One group per weight, each with so many MiB of KV cache per position."""
    groups = tuple(
        ModuleGroup(
            id=f"g{i}",
            modules=(f"g{i}",),
            role="decoder_layer",
            weight_bytes=weight * GIB,
            num_parameters=1,
            kv_bytes_per_position=kv_mib * MIB,
        )
        for i, weight in enumerate(weights_gib)
    )
    return ModuleGraph(name="toy", dtype="float16", groups=groups)


def devices(*capacities: int) -> Machine:
    """Devices that hold exactly so many bytes beside the workspace."""
    return Machine(
        devices=tuple(
            Device(index=i, memory_bytes=WORKSPACE_BYTES + capacity, context_bytes=0, reserve_bytes=0)
            for i, capacity in enumerate(capacities)
        )
    )


def error_for(graph: ModuleGraph, machine: Machine, **counts: int) -> InfeasibleError:
    """The error of a problem that must be infeasible."""
    defaults = {"batch": 1, "images": 0, "patches": 0, "text_tokens": 100, "image_tokens": 0, "positions": 0}
    problem = Problem.of(graph, machine, Quantities(**{**defaults, **counts}))
    solution = chain_dp.solve(problem)
    assert solution.status == "INFEASIBLE"
    return infeasible(problem, solution)


# -- numbers


def test_one_byte_short_is_said_to_the_byte() -> None:
    error = error_for(toy(10), devices(10 * GIB - 1))
    assert error.shortfall_bytes == {"cuda:0": 1}
    assert str(error).startswith(
        "toy in float16 does not fit: 1 B are missing on 1 of 1 devices in the nearest placement."
    )
    assert error.exit_code == 1


def test_each_short_device_is_listed_with_all_its_parts_and_their_sum() -> None:
    """Two groups of 10 GiB and 1 MiB per position, 1024 positions: 11 GiB each, on 9 and 20 GiB."""
    lines = str(error_for(toy(10, 10, kv_mib=1), devices(9 * GIB, 20 * GIB), positions=1024)).splitlines()
    assert lines[:2] == [
        "toy in float16 does not fit: 2.00 GiB are missing on 1 of 2 devices in the nearest placement.",
        "cuda:0 is short by 2.00 GiB: 10.00 GiB weights + 1.00 GiB KV cache + 52.0 MiB workspace = 11.05 GiB, "
        "of 9.05 GiB. The weights bind.",
    ]


def test_devices_that_suffice_are_not_listed() -> None:
    error = error_for(toy(10, 30), devices(29 * GIB, 10 * GIB))
    assert error.shortfall_bytes == {"cuda:0": GIB} and "cuda:1" not in str(error)


def test_the_part_that_binds_is_the_largest() -> None:
    error = error_for(toy(1, kv_mib=1), devices(2 * GIB), positions=4096)
    assert "1.00 GiB weights + 4.00 GiB KV cache" in str(error) and "The KV cache bind" in str(error)


def test_context_and_reserve_count_and_are_named() -> None:
    machine = devices(4 * GIB).with_overheads(context_bytes=GIB, reserve_bytes=2 * GIB)
    error = error_for(toy(3), machine)
    assert error.shortfall_bytes == {"cuda:0": 2 * GIB}
    assert "+ 1.00 GiB context + 2.00 GiB reserve = " in str(error)


def test_the_shortfall_is_that_of_the_nearest_placement() -> None:
    """30 + 10 on 20 + 15: apart, only the first lacks 10; together, one device lacks 20 or 25."""
    assert error_for(toy(30, 10), devices(20 * GIB, 15 * GIB)).shortfall_bytes == {"cuda:0": 10 * GIB}


# -- advice on toys


def test_a_shorter_context_is_advised_to_the_last_position() -> None:
    """1 GiB left beside the weights, 1 MiB per position: 1024 positions, 100 of them prompt."""
    error = error_for(toy(10, kv_mib=1), devices(11 * GIB), positions=5000)
    assert error.advice[0] == "--new-tokens 924 (with --max-model-len 1024 or less)"


def test_no_context_is_advised_that_does_not_hold_the_prompt_and_one_new_token() -> None:
    at_the_limit = error_for(toy(10, kv_mib=1), devices(11 * GIB), positions=5000, text_tokens=1023)
    assert at_the_limit.advice[0] == "--new-tokens 1 (with --max-model-len 1024 or less)"
    beyond = error_for(toy(10, kv_mib=1), devices(11 * GIB), positions=5000, text_tokens=1024)
    assert not any("--new-tokens" in advice for advice in beyond.advice)


def test_image_positions_are_part_of_the_prompt() -> None:
    error = error_for(toy(10, kv_mib=1), devices(11 * GIB), positions=5000, images=1, image_tokens=900)
    assert error.advice[0] == "--new-tokens 24 (with --max-model-len 1024 or less)"


def test_a_smaller_batch_is_advised_to_the_last_sequence() -> None:
    error = error_for(toy(10, kv_mib=1), devices(11 * GIB), positions=256, batch=9)
    assert "--batch-size 4" in error.advice


@pytest.mark.parametrize(
    ("asked", "gpus", "advice"),
    [
        (Workload(batch_size=40, num_beams=3), "24GiB", "--batch-size 4"),
        (Workload(num_beams=1000), "24GiB", "--num-beams 14"),
        (Workload(batch_size=2, num_beams=20), "24GiB", "--num-beams 14 --batch-size 1"),
    ],
)
def test_a_request_of_several_beams_is_that_many_sequences_in_advice(asked: Workload, gpus: str, advice: str) -> None:
    model, machine = find_model("internlm-xcomposer2-vl-7b"), Machine.parse(gpus)
    with pytest.raises(InfeasibleError) as refusal:
        plan_for(model, machine, asked)
    assert advice in refusal.value.advice
    assert sum("--batch-size" in one for one in refusal.value.advice) <= 1
    words = advice.split()
    changed = {name[2:].replace("-", "_"): int(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert plan_for(model, machine, replace(asked, **changed)).kv_tokens is not None
    last = words[0][2:].replace("-", "_")
    with pytest.raises(InfeasibleError):
        plan_for(model, machine, replace(asked, **changed | {last: changed[last] + 1}))


def test_more_devices_are_advised_of_the_largest_kind_and_one_as_large_as_it_takes() -> None:
    error = error_for(toy(10, 10, 10, 10), devices(9 * GIB, 10 * GIB))
    assert error.advice == (
        "--gpus 9268MiB,10292MiB,31GiB (1 more device of 31GiB)",
        "--gpus 9268MiB,4x10292MiB (3 more devices of 10292MiB)",
    )
    assert error_for(toy(10, 10), devices(10 * GIB)).advice[-1] == "--gpus 2x10292MiB (1 more device of 10292MiB)"


def test_where_no_shorthand_says_what_the_machine_is_words_do() -> None:
    odd = devices(10 * GIB)
    odd = replace(odd, devices=(replace(odd.devices[0], index=3),))
    assert error_for(toy(10, 10), odd).advice[-1] == "1 more device of 10292MiB"


def test_advice_is_in_the_message_and_every_piece_is_an_alternative() -> None:
    error = error_for(toy(10, 10, kv_mib=1), devices(11 * GIB, 11 * GIB), positions=900, batch=2)
    assert error.advice[:2] == ("--new-tokens 412 (with --max-model-len 512 or less)", "--batch-size 1")
    assert str(error).splitlines()[-1] == f"Would fit: {'; or '.join(error.advice)}."


def test_a_part_that_no_device_holds_is_named() -> None:
    error = error_for(toy(10), devices(9 * GIB))
    assert "No device holds g0 alone (10.00 GiB of weights), and that cannot be cut." in str(error)
    assert "No device holds" not in str(error_for(toy(10, 10), devices(10 * GIB)))


def test_without_any_advice_the_message_says_what_was_tried() -> None:
    error = error_for(toy(300), devices(9 * GIB))
    assert error.advice == ()
    assert str(error).endswith("No shorter context, smaller batch or one to 8 more devices of this size would fit.")
    assert MAX_EXTRA_DEVICES == 8


def test_eight_more_devices_are_advised_and_nine_are_not() -> None:
    assert error_for(toy(*[40] * 9), devices(40 * GIB)).advice == ("--gpus 9x41012MiB (8 more devices of 41012MiB)",)
    assert error_for(toy(*[40] * 10), devices(40 * GIB)).advice == ()


# -- advice on the real model, followed


def outcome(spec: str, workload: Workload) -> Plan | InfeasibleError:
    try:
        return plan_for(COMPOSER, Machine.parse(spec), workload)
    except InfeasibleError as error:
        return error


def options(spec: str, workload: Workload) -> list[str]:
    """The command line that asks for a workload."""
    given = {
        field: getattr(workload, field) for field in ("batch_size", "prompt_tokens", "new_tokens", "max_model_len")
    }
    named = {field: getattr(workload, field) for field in ("dtype", "attention")}
    texts = {field.replace("_", "-"): str(value) for field, value in {**given, **named}.items() if value is not None}
    return ["--gpus", spec, *(part for name, text in texts.items() for part in (f"--{name}", text))]


def exit_code(spec: str, workload: Workload, advice: str, output: Path) -> int:
    """Of the command as it was asked, with the advised options behind it; a later option counts."""
    argv = [COMPOSER.name, *options(spec, workload), "--no-proof", "--quiet", "-o", str(output), "--force"]
    if advice.startswith("--new-tokens"):
        argv += ["--max-model-len", re.findall(r"--max-model-len (\d+)", advice)[0]]
    return main([*argv, *advice.partition(" (")[0].split()])


def beyond(advice: str, spec: str) -> str | None:
    """The same advice by one unit more, or fewer; None where it has no unit."""
    if match := re.match(r"--(new-tokens|batch-size) (\d+)", advice):
        more = f"--{match[1]} {int(match[2]) + 1}"
        return f"{more} (with --max-model-len 9999999 or less)" if match[1] == "new-tokens" else more
    if match := re.search(r"\((\d+) more devices? of (\S+)\)", advice):
        count, size = int(match[1]) - 1, re.fullmatch(r"(\d+)GiB", match[2])
        if count:
            return f"--gpus {spec},{count}x{match[2]}"
        if size and size[0] not in spec:
            return f"--gpus {spec},{int(size[1]) - 1}GiB"
        return f"--gpus {spec}"
    return None


DOES_NOT_FIT: dict[str, tuple[str, Workload, set[str]]] = {
    "a long context": ("24GiB", Workload(new_tokens=100_000), {"--new-tokens", "more"}),
    "a long cache": ("24GiB,8GiB", Workload(max_model_len=1_000_000), {"--new-tokens", "more"}),
    "a large batch": ("24GiB", Workload(batch_size=64, new_tokens=4096), {"--batch-size", "more"}),
    "a long context and a batch": (
        "24GiB",
        Workload(batch_size=4, new_tokens=20_000),
        {"--new-tokens", "--batch-size", "more"},
    ),
    "small devices": ("2x6GiB", Workload(), {"more"}),
    "one named kind": ("t4", Workload(new_tokens=30_000), {"more"}),
    "a named kind and a batch": ("rtx4090", Workload(batch_size=40, new_tokens=2000), {"--batch-size", "more"}),
    "float32": ("24GiB", Workload(dtype="float32"), {"--dtype", "more"}),
    "eager attention": ("rtx4090", Workload(attention="eager", prompt_tokens=5000), {"--attention", "more"}),
}


@pytest.mark.parametrize(("spec", "workload", "kinds"), DOES_NOT_FIT.values(), ids=DOES_NOT_FIT)
def test_advice_is_true_and_one_unit_more_than_advised_does_not_fit(
    spec: str, workload: Workload, kinds: set[str], tmp_path: Path
) -> None:
    error = outcome(spec, workload)
    assert isinstance(error, InfeasibleError)
    assert kinds <= {word for advice in error.advice for word in advice.split()}
    for advice in error.advice:
        assert exit_code(spec, workload, advice, tmp_path / "plan.yaml") == 0, advice
        further = beyond(advice, spec)
        assert further is None or exit_code(spec, workload, further, tmp_path / "plan.yaml") == 1, further


def test_the_cache_length_that_is_advised_is_the_longest_that_fits() -> None:
    error = outcome("24GiB", Workload(new_tokens=100_000))
    assert isinstance(error, InfeasibleError)
    longest = int(re.findall(r"--max-model-len (\d+)", str(error.advice))[0])
    assert isinstance(outcome("24GiB", Workload(max_model_len=longest)), Plan)
    assert isinstance(outcome("24GiB", Workload(max_model_len=longest + 1)), InfeasibleError)


def test_where_no_advice_is_given_none_of_it_would_help() -> None:
    error = outcome("2GiB", Workload(batch_size=2))
    assert isinstance(error, InfeasibleError)
    assert [advice.split()[0] for advice in error.advice] == ["--gpus"] and "1 more device of 18GiB" in error.advice[0]
    for spec, workload in (("2GiB", Workload(batch_size=1)), ("2GiB", Workload(new_tokens=1)), ("9x2GiB", Workload())):
        assert isinstance(outcome(spec, workload), InfeasibleError)


def test_the_named_shortfall_is_what_a_device_must_gain_to_fit() -> None:
    error = outcome("16GiB", Workload())
    assert isinstance(error, InfeasibleError)
    missing = error.shortfall_bytes["cuda:0"]
    assert isinstance(outcome(f"{16 * GIB + missing}B", Workload()), Plan)
    assert isinstance(outcome(f"{16 * GIB + missing - 1}B", Workload()), InfeasibleError)
