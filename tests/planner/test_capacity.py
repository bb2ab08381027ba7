"""The room that a plan promises is room that can be asked for."""

from __future__ import annotations

import pytest

from planner.machine import Machine
from planner.workload import Workload
from vlm.model import find_model
from vlm.planning import plan_for

WORKLOADS = [Workload(), Workload(batch_size=8), Workload(attention="eager"), Workload(num_images=0, new_tokens=4096)]


@pytest.mark.parametrize("workload", WORKLOADS, ids=["default", "batch", "eager", "text"])
@pytest.mark.parametrize("spec", ["24GiB", "2x24GiB", "24GiB,12GiB,8GiB", "a100-80g"])
def test_a_cache_of_the_promised_length_fits(spec: str, workload: Workload) -> None:
    model, machine = find_model("internlm-xcomposer2-vl-7b"), Machine.parse(spec)
    promised = plan_for(model, machine, workload).kv_tokens
    longer = Workload(
        batch_size=workload.batch_size,
        num_images=workload.num_images,
        new_tokens=workload.new_tokens,
        attention=workload.attention,
        max_model_len=promised,
    )
    assert plan_for(model, machine, longer).kv_tokens is not None
