"""The helpers that models are published with: their rules as read from their sources, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from planner.diagnosis.coverage import coverage_findings
from planner.diagnosis.diagnosis import Finding
from planner.diagnosis.map_file import given_map
from runtime.diagnosis.map_case import names_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def helpers() -> ModuleType:
    spec = spec_from_file_location("check_helpers", ROOT / "benchmarks" / "check_helpers.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layers_per_gpu(device_map: dict[str, int], prefix: str, num_gpus: int) -> tuple[int, ...]:
    counts = Counter(gpu for name, gpu in device_map.items() if name.startswith(prefix))
    return tuple(counts[gpu] for gpu in range(num_gpus))


@pytest.mark.parametrize(
    ("num_gpus", "first", "second"),
    [
        (1, (32,), (32,)),
        (2, (13, 19), (16, 16)),
        (3, (7, 13, 12), (10, 13, 9)),
        (4, (4, 10, 10, 8), (7, 10, 10, 5)),
        (5, (2, 8, 8, 8, 6), (5, 8, 8, 8, 3)),
        (6, (1, 7, 7, 7, 7, 3), (4, 7, 7, 7, 7, 0)),
        (8, (0, 5, 5, 5, 5, 5, 5, 2), (2, 5, 5, 5, 5, 5, 5, 0)),
    ],
)
def test_the_rules_give_the_layers_that_the_helpers_give(
    helpers: ModuleType, num_gpus: int, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    version_1, version_2 = helpers.xcomposer1_helper(num_gpus), helpers.xcomposer_helper(num_gpus)
    assert layers_per_gpu(version_1, "internlm_model.model.layers.", num_gpus) == first
    assert layers_per_gpu(version_2, "model.layers.", num_gpus) == second


def named(model: nn.Module, device_map: dict[str, int]) -> list[Finding]:
    """What the names of a model and a map show, without a run."""
    return list(coverage_findings(given_map(device_map), names_of(model), home=0))


def test_two_gpus_and_eighty_layers_name_a_layer_that_is_not_there(helpers: ModuleType) -> None:
    device_map = helpers.internvl_helper(80, 2, with_rotary=True)
    (finding,) = named(helpers.RemoteInternVl(80), device_map)
    assert "3 of 89 entries match nothing" in finding.title
    assert finding.evidence[0].startswith("language_model.model.layers.80")
    assert finding.severity == "wasteful"


def test_a_split_model_without_rotary_emb_fails_with_tables_as_they_were_and_is_repaired(helpers: ModuleType) -> None:
    model = helpers.RemoteInternVl(4, older_rotary=True)
    diagnosis = helpers.diagnosed_internvl(model, helpers.internvl_helper(4, 2, with_rotary=False))
    (failure,) = diagnosis.of("will fail")
    assert (failure.hazard, failure.title) == ("rope", "bmm: operands on cpu and cuda:0")
    assert diagnosis.repair is not None and diagnosis.repair.proven
    assert diagnosis.repair.device_map["language_model.model.rotary_emb"] == 0
    assert helpers.diagnosed_internvl(model, helpers.internvl_helper(4, 2, with_rotary=True)).safe


def test_the_2_0_helper_leaves_the_root_parameters_of_2_5_without_a_device(helpers: ModuleType) -> None:
    skeleton, bare = helpers.xcomposer_rehearsed(bare=True).skeleton, ("plora_glb_GN", "plora_sub_GN")
    (failure,) = named(skeleton, helpers.xcomposer_helper(2))
    assert (failure.severity, failure.title) == ("will fail", "2 tensors have no entry")
    assert failure.evidence[0] == "plora_glb_GN, plora_sub_GN"
    assert named(skeleton, helpers.xcomposer_helper(2, bare=bare)) == []


def test_version_1s_names_match_nothing_of_version_2(helpers: ModuleType) -> None:
    device_map = helpers.xcomposer1_helper(2)
    findings = named(helpers.xcomposer_rehearsed(bare=False).skeleton, device_map)
    assert f"{len(device_map)} of {len(device_map)} entries match nothing" in findings[-1].title
    assert findings[0].severity == "will fail"


def test_the_page_in_docs_is_of_the_rules(helpers: ModuleType) -> None:
    page = (ROOT / "docs" / "helpers.md").read_text(encoding="utf-8")
    for said in (
        "| 6 | 4, 7, 7, 7, 7, 0 |",
        "plora_glb_GN, plora_sub_GN",
        "layers.80",
        "bmm: operands on cpu and cuda:0",
    ):
        assert said in page
