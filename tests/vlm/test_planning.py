"""Advice that needs to know the model: options that make a request fit, each true and needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from planner import InfeasibleError, Machine, Workload
from planner.constraints import Constraints
from vlm.model import find_model
from vlm.planning import plan_for

MODEL = "internlm-xcomposer2-vl-7b"


@pytest.mark.parametrize(
    ("spec", "workload", "option", "change"),
    [
        ("24GiB", Workload(dtype="float32"), "--dtype float16", {"dtype": "float16"}),
        ("24GiB", Workload(attention="eager", prompt_tokens=12_000), "--attention sdpa", {"attention": "sdpa"}),
        ("24GiB", Workload(num_images=40), "--num-images 23", {"num_images": 23}),
    ],
    ids=["dtype", "attention", "images"],
)
def test_an_option_that_is_advised_fits(spec: str, workload: Workload, option: str, change: dict[str, Any]) -> None:
    model, machine = find_model(MODEL), Machine.parse(spec)
    with pytest.raises(InfeasibleError) as refusal:
        plan_for(model, machine, workload)
    assert option in refusal.value.advice
    assert plan_for(model, machine, replace(workload, **change))


def test_one_image_more_than_advised_does_not_fit() -> None:
    model, machine = find_model(MODEL), Machine.parse("24GiB")
    with pytest.raises(InfeasibleError) as refusal:
        plan_for(model, machine, Workload(num_images=40))
    [advised] = [int(a.split()[1]) for a in refusal.value.advice if a.startswith("--num-images")]
    assert plan_for(model, machine, Workload(num_images=advised))
    with pytest.raises(InfeasibleError):
        plan_for(model, machine, Workload(num_images=advised + 1))


def test_a_vision_path_that_fits_no_device_may_be_split() -> None:
    model, machine = find_model(MODEL), Machine.parse("64x2GiB")
    with pytest.raises(InfeasibleError) as refusal:
        plan_for(model, machine)
    assert "--split-vision" in refusal.value.advice
    assert plan_for(model, machine, constraints=Constraints(split_vision=True))
