"""How models are cut: what crosses between stages follows from a run, not from knowing the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from planner import Machine, Plan, UnsupportedModelError, Workload
from planner.plan import Stage
from runtime.pipeline.cut import Cut, cut
from runtime.pipeline.flows import Flows, Source, follow, refuse_uncut
from runtime.pipeline.stage import StageModel
from runtime.planning import plan_model
from runtime.steps import Watch, forward_and_decode
from vlm.inputs import example_inputs
from vlm.tiny import tiny_model


def planned(model_type: str, num_stages: int = 2) -> tuple[PreTrainedModel, Flows, Plan]:
    model, _ = tiny_model(model_type)
    inputs = example_inputs(model)
    plan = plan_model(model, inputs, machine=Machine.parse(f"{num_stages}x24GiB"), workload=Workload(new_tokens=4))
    return model, follow(model, inputs, forward_and_decode()), plan


def values_sent(found: Cut, stage: int) -> dict[str, list[int]]:
    """By module, the stages that get its value from a stage."""
    sends = found.parts[stage].sends.items()
    return {name: [one.target for one in some if one.value] for name, some in sends if any(s.value for s in some)}


def test_hidden_states_cross_once_and_integers_never() -> None:
    _, flows, plan = planned("llava", 3)
    found = cut(flows, plan)
    first, second, last = (values_sent(found, stage) for stage in range(3))
    assert first == {"model.language_model.embed_tokens": [1], "model.multi_modal_projector.linear_2": [1]}
    assert second == {"model.language_model.layers.0": [2]}
    assert last == {}
    assert [part.inputs for part in found.parts] == [frozenset({"pixel_values"}), frozenset(), frozenset()]


def test_features_for_a_later_layer_cross_to_the_stage_of_that_layer_alone() -> None:
    """Qwen3-VL adds a vision layer's features to what decoder layers give: deepstack."""
    _, flows, plan = planned("qwen3_vl", 3)
    sent = values_sent(cut(flows, plan), 0)
    assert sent["model.visual.deepstack_merger_list.0"] == [2]
    assert sent["model.visual.merger.linear_fc2"] == [1]


def test_cross_attention_states_cross_to_every_stage_that_reads_them() -> None:
    _, flows, plan = planned("mllama", 3)
    assert values_sent(cut(flows, plan), 0)["model.multi_modal_projector"] == [1, 2]


def test_what_forwards_leave_behind_belongs_to_a_group() -> None:
    _, flows, _ = planned("qwen3_vl")
    assert flows.state == (("model", "rope_deltas"),)


def test_a_tied_head_runs_on_the_last_stage() -> None:
    _, flows, plan = planned("gemma3")
    assert plan.placement["lm_head"] == 0 or plan.placement.get("model.language_model.embed_tokens") == 0
    found = cut(flows, plan)
    assert "lm_head" in found.parts[1].atoms
    assert found.moved == ({"lm_head": (0, 1)} if plan.placement.get("lm_head") == 0 else {})


def test_every_atom_that_runs_does_so_on_one_stage() -> None:
    for model_type in ("llava", "mllama", "qwen3_vl"):
        _, flows, plan = planned(model_type, 3)
        atoms = [atom for part in cut(flows, plan).parts for atom in part.atoms]
        assert len(set(atoms)) == len(atoms)
        ran = {call.module for call in flows.calls if call.module in flows.atoms} - flows.everywhere
        assert set(atoms) == ran


REFUSED: Mapping[str, str] = {
    "florence2": "is an encoder-decoder",
    "t5gemma2": "is an encoder-decoder",
    "blip-2": "generates in a way of its own",
    "kosmos-2": "generates in a way of its own",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_reason(model_type: str) -> None:
    model, _ = tiny_model(model_type)
    with pytest.raises(UnsupportedModelError, match=f"{REFUSED[model_type]}.*in one process"):
        refuse_uncut(model)


def test_what_a_layer_keeps_for_itself_does_not_cross() -> None:
    """GIT computes between its layers with the keys that a layer has put into the cache."""
    _, flows, plan = planned("git", 3)
    with pytest.raises(UnsupportedModelError, match="keeps and does not return, such as keys that layers share"):
        cut(flows, plan)


class Layer(nn.Module):
    """Adds what the layer before has kept, without being given it."""

    def __init__(self, before: Layer | None) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.before = [before]
        self.kept: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.kept = self.linear(hidden)
        before = self.before[0]
        return hidden + self.kept + (before.kept if before is not None and before.kept is not None else 0)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = Layer(None)
        self.layers = nn.ModuleList([first, Layer(first)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def once(model: nn.Module, inputs: Mapping[str, Any], watch: Watch) -> list[Any]:
    watch.phase = "prefill"
    watch.note_cache(object())
    return [model(**inputs)]


def in_two(plan: Plan) -> Plan:
    stages = tuple(Stage(device=index, modules=(f"layers.{index}",)) for index in range(2))
    return replace(plan, stages=stages, placement={"layers.0": 0, "layers.1": 1})


def test_a_layer_that_reads_what_another_left_behind_stays_with_it() -> None:
    model = Layers()
    flows = follow(model, {"hidden": torch.randn(2, 5, 64)}, once)
    assert [secret.atom for secret in flows.secrets] == ["layers.1"]
    assert flows.secrets[0].sources == frozenset({Source("inside", "layers.0")})
    _, _, plan = planned("llava")
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1 reads what layers\.0 left behind without being given it"
    ):
        cut(flows, in_two(plan))
    together = replace(in_two(plan), placement={"layers.0": 1, "layers.1": 1})
    assert cut(flows, together).parts[1].atoms == ("layers.0", "layers.1")


class Chooser(nn.Module):
    """Runs its second layer where the first one's values say so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first, second, third = self.layers
        hidden = first(hidden)
        large = bool((hidden.sum() > 0).item())
        return third(second(hidden) if large else second(-hidden))


def test_a_choice_by_values_brings_these_values_to_every_stage_that_chooses() -> None:
    flows = follow(Chooser(), {"hidden": torch.randn(2, 40, 64)}, once)
    assert any(Source("output", "layers.0") in choice.sources for choice in flows.choices)
    _, _, plan = planned("llava")
    stages = tuple(Stage(device=index, modules=(f"layers.{index}",)) for index in range(3))
    three = replace(plan, stages=stages, placement={f"layers.{index}": index for index in range(3)})
    assert values_sent(cut(flows, three), 0) == {"layers.0": [1, 2]}


class Words(nn.Module):
    """Looks up ids with a batch and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(10, 64), nn.Linear(64, 64)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        table, linear = self.layers
        return linear(table(ids) + table(ids[0]))


def test_a_table_that_is_asked_in_two_shapes_tells_both_sizes_by_one_rule() -> None:
    flows = follow(Words(), {"ids": torch.arange(8).reshape(2, 4)}, once)
    _, _, plan = planned("llava")
    rule = cut(flows, in_two(plan)).parts[1].standins["layers.0"].rule
    assert rule is not None
    assert rule.shape((3, 5)) == (3, 5, 64) and rule.shape((7,)) == (7, 64)


def test_a_way_through_the_model_that_was_not_followed_is_refused_when_it_is_taken() -> None:
    model, _, plan = planned("llava")
    text_alone = follow(model, {"input_ids": torch.arange(5, 37)[None]}, forward_and_decode())
    found = cut(text_alone, plan)
    assert "model.multi_modal_projector.linear_1" in found.parts[0].unseen

    class NoTransport:
        device = torch.device("cpu")

    stage = StageModel(model, found, 0, NoTransport())  # type: ignore[arg-type]  # nothing is sent before the refusal
    with pytest.raises(UnsupportedModelError, match="did not run when the model was cut, and no stage has its weights"):
        stage.forward(example_inputs(model), None)
