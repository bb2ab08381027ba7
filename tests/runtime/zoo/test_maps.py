"""What maps themselves get wrong: holes, names of another version, ties, offload, spelling, launchers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from torch import Tensor, nn

from planner import Machine, PlanMismatchError, UnsupportedModelError
from planner.diagnosis.diagnosis import Diagnosis, Finding
from runtime.diagnosis.diagnosis import diagnose
from runtime.diagnosis.map_case import names_of
from runtime.virtual import virtual_gpus

D = 8


class Layered(nn.Module):
    """An embedding, layers and a head, tied if asked.

    The last layer's weight may be read without calling it, and so may the bare tensor beside the layers.
    """

    def __init__(
        self, *, tied: bool = False, reads_past: bool = False, reads_bare: bool = False, prefix: str = "model"
    ) -> None:
        super().__init__()
        inner = nn.Module()
        inner.embedding = nn.Embedding(16, D)
        inner.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(12))
        inner.newline = nn.Parameter(torch.ones(D))
        inner.norm = nn.LayerNorm(D)
        self.add_module(prefix, inner)
        self.head = nn.Linear(D, 16, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        if tied:
            self.head.weight = inner.embedding.weight
        self._prefix, self._reads_past, self._reads_bare = prefix, reads_past, reads_bare

    def forward(self, input_ids: Tensor) -> Tensor:
        inner = self.get_submodule(self._prefix)
        hidden = inner.embedding(input_ids)
        if self._reads_bare:
            hidden = hidden + inner.newline
        for layer in inner.layers[:-1]:
            hidden = layer(hidden)
        last = inner.layers[-1]
        hidden = F.linear(hidden, last.weight, last.bias) if self._reads_past else last(hidden)
        logits = self.head(inner.norm(hidden))
        return logits * self.scale.to(logits.device)


def whole_map(prefix: str = "model", **changes: Any) -> dict[str, Any]:
    layers = {f"{prefix}.layers.{i}": i // 6 for i in range(12)}
    ends = {f"{prefix}.embedding": 0, f"{prefix}.newline": 0, f"{prefix}.norm": 1, "head": 1, "scale": 0}
    return {**ends, **layers, **changes}


def diagnosed(model: nn.Module, device_map: Any, **options: Any) -> Diagnosis:
    return diagnose(model.eval(), {"input_ids": torch.tensor([[1, 2, 3]])}, device_map, **options)


def found(diagnosis: Diagnosis, text: str) -> Finding:
    matching = [finding for finding in diagnosis.findings if text in finding.title]
    assert len(matching) == 1, [finding.title for finding in diagnosis.findings]
    return matching[0]


def test_a_whole_map_is_clean() -> None:
    assert diagnosed(Layered(), whole_map()).verdict == "clean"


def test_a_tensor_without_an_entry_is_what_accelerate_refuses() -> None:
    entries = {name: place for name, place in whole_map().items() if name not in ("model.norm", "model.newline")}
    diagnosis = diagnosed(Layered(), entries)
    finding = found(diagnosis, "3 tensors have no entry")
    assert (finding.severity, finding.hazard) == ("will fail", "bareparam")
    assert "model.norm" in finding.evidence[0]
    assert diagnosis.repair is not None and diagnosis.repair.proven
    assert diagnosed(Layered(), diagnosis.repair.device_map).verdict == "clean"


def test_entries_of_a_renamed_prefix_are_offered_their_new_names_and_repaired() -> None:
    diagnosis = diagnosed(Layered(prefix="language_model"), whole_map("model"))
    finding = found(diagnosis, "15 of 17 entries match nothing")
    assert "model.* is probably language_model.*" in finding.evidence
    assert diagnosis.repair is not None and diagnosis.repair.proven
    assert diagnosis.repair.device_map == whole_map("language_model")


def test_entries_beyond_the_last_layer_are_named() -> None:
    finding = found(diagnosed(Layered(), whole_map(**{"model.layers.12": 1})), "1 of 18 entries match nothing")
    assert finding.severity == "wasteful"
    assert "model.layers.12" in finding.evidence[0]


def test_an_entry_that_takes_others_by_its_text_is_named() -> None:
    entries = {name: place for name, place in whole_map().items() if name != "model.layers.11"}
    assert found(diagnosed(Layered(), entries), "takes tensors of other modules").place == "model.layers.1"


def test_an_entry_that_finer_ones_shadow_is_named() -> None:
    entries = {"model.layers": 1, **whole_map()}
    assert found(diagnosed(Layered(), entries), "model.layers is shadowed").severity == "wasteful"


@pytest.mark.parametrize(
    ("changes", "around"),
    [({"scale": 1}, "the root's own tensors"), ({"model": 0, "model.newline": 1}, "the entry model")],
)
def test_the_entry_of_a_bare_tensor_that_a_hook_overrules_is_named(changes: dict[str, int], around: str) -> None:
    finding = found(diagnosed(Layered(), whole_map(**changes)), "is ignored")
    assert around in finding.evidence[0]
    assert "takes it to cuda:0, not cuda:1" in finding.evidence[0]


def test_a_tied_weight_on_two_devices_fails_because_accelerate_ties_it_again() -> None:
    diagnosis = diagnosed(Layered(tied=True), whole_map())
    named = found(diagnosis, "model.embedding.weight and head.weight are one weight on 2 devices")
    met = found(diagnosis, "operands on cuda:")
    assert (named.hazard, met.hazard, met.severity) == ("tied", "tied", "will fail")
    assert diagnosis.repair is not None and diagnosis.repair.proven
    assert diagnosed(Layered(tied=True), diagnosis.repair.device_map).verdict == "clean"
    assert diagnosed(Layered(tied=True), whole_map(head=0)).verdict == "clean"


def test_accelerate_itself_fails_on_that_map() -> None:
    model = Layered(tied=True).eval()
    devices = virtual_gpus([2**30] * 2).devices
    warnings.filterwarnings("ignore", message="The following device_map keys do not match")
    dispatch_model(model, whole_map(), main_device=0, force_hooks=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="found at least two devices, vgpu:[01] and vgpu:[01]"):
        model(torch.tensor([[1, 2, 3]], device=devices[0]))


def test_an_offloaded_weight_that_is_read_past_its_module_fails_and_one_that_is_not_is_slow() -> None:
    offloaded = whole_map(**{"model.layers.11": "cpu"})
    fine = diagnosed(Layered(), offloaded)
    assert fine.safe
    assert found(fine, "of weights stay on cpu").severity == "wasteful"
    broken = diagnosed(Layered(reads_past=True), offloaded)
    finding = found(broken, "model.layers.11.weight is kept on cpu")
    assert (finding.severity, finding.hazard) == ("will fail", "offload")
    assert "F.linear(hidden, last.weight" in finding.place
    assert broken.repair is not None and broken.repair.proven
    assert diagnosed(Layered(reads_past=True), broken.repair.device_map).verdict == "clean"


def test_a_bare_tensor_off_the_gpus_is_never_brought_to_one() -> None:
    entries = whole_map(**{"model.newline": "cpu"})
    broken = diagnosed(Layered(reads_bare=True), entries)
    finding = found(broken, "model.newline is kept on cpu and read while it is on no GPU")
    assert (finding.severity, finding.hazard, finding.fix) == ("will fail", "offload", "Put model.newline on a GPU.")
    assert "hidden + inner.newline" in finding.place
    assert broken.repair is not None and broken.repair.proven
    assert broken.repair.device_map["model.newline"] == 0
    assert diagnosed(Layered(), entries).safe


def test_a_map_without_a_gpu_runs_on_the_host_and_is_only_a_waste() -> None:
    diagnosis = diagnosed(Layered(reads_past=True), {"": "cpu"}, machine=Machine.parse("2x2GiB"))
    assert [finding.title for finding in diagnosis.findings] == ["no GPU is used: everything stays on cpu"]
    assert diagnosis.given is None and diagnosis.ours is not None
    assert (
        found(diagnosed(Layered(reads_past=True), {"": "disk"}), "layers.11.weight is kept on disk").hazard == "offload"
    )


def test_text_devices_make_the_main_device_a_matter_of_the_process() -> None:
    entries = {name: f"cuda:{place}" for name, place in whole_map().items()}
    finding = found(diagnosed(Layered(), entries), "changes from one process to the next")
    assert finding.hazard == "genio"


def test_digits_in_quotes_are_no_devices() -> None:
    entries = {name: str(place) for name, place in whole_map().items()}
    assert found(diagnosed(Layered(), entries), "digits in quotes").severity == "will fail"


def test_a_map_that_spans_gpus_in_each_of_several_processes_fails() -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    finding = found(diagnosed(Layered(), whole_map(), environment=environment), "2 processes would each load")
    assert (finding.severity, finding.hazard) == ("will fail", "launcher")
    assert "LOCAL_RANK=1" in finding.evidence[0]
    assert diagnosed(Layered(), {"": 0}, environment=environment).verdict == "clean"


def test_a_map_for_gpus_that_the_machine_lacks_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"head: 5; this machine has the GPUs 0, 1"):
        diagnosed(Layered(), whole_map(head=5), machine=Machine.parse("2x2GiB"))


def test_a_model_that_does_not_run_whole_is_no_fault_of_its_map() -> None:
    with pytest.raises(UnsupportedModelError, match="does not run on one device either: IndexError"):
        diagnose(Layered().eval(), {"input_ids": torch.tensor([[99]])}, whole_map())


def test_names_hold_every_tensor_its_bytes_and_its_ties() -> None:
    names = names_of(Layered(tied=True))
    assert names.ties == (("model.embedding.weight", "head.weight"),)
    assert names.bytes_under("model.embedding") == 16 * D * 4
    assert "head.weight" not in names.parameters
