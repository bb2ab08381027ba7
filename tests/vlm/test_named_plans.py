"""The plans of the models that people name, on the smallest machine that holds them and on one A100 40G.

After an intended change, `golden_plans/update.py` writes the files anew; the diff is the review.
"""

from __future__ import annotations

import pytest

from planner import Workload
from planner.units import GIB
from tests.vlm.golden_plans.update import CASES, FOLDER, text_of
from vlm.model import find_model


@pytest.mark.parametrize("case", CASES)
def test_plans_of_named_models_are_the_golden_ones(case: str) -> None:
    assert text_of(case) == (FOLDER / f"{case}.txt").read_text(encoding="utf-8")


def test_there_is_no_golden_plan_without_a_model() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize(
    ("name", "dtype", "gib"),
    [
        ("internlm2-20b", "float16", 36.99),
        ("internlm2-7b", "float16", 14.41),
        ("llama-2-7b-hf", "float16", 12.55),
        ("llama-2-13b-hf", "float16", 24.24),
        ("llama-2-70b-hf", "float16", 128.48),
        ("qwen-7b-chat", "bfloat16", 14.38),
        ("glm-4v-9b", "bfloat16", 25.90),
    ],
)
def test_weights_are_those_that_are_published_or_counted(name: str, dtype: str, gib: float) -> None:
    """InternLM issue 602 says 37 G of the 20B, GLM-4 issue 500 the counts of its parts; the others are counted."""
    model = find_model(name)
    graph = model.graph(model.resolved(Workload(num_images=0, dtype=dtype)))
    assert graph.weight_bytes / GIB == pytest.approx(gib, abs=0.005)
