"""Operations that meet what a map keeps apart: one small module per class, flagged, repaired, and clean afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planner.diagnosis.diagnosis import Diagnosis, Hazard
from runtime.diagnosis.diagnosis import diagnose

D, VOCABULARY, IMAGE_ID = 8, 16, 3


class Block(nn.Module):
    """A residual block of two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(hidden)))


class Vision(nn.Module):
    """An encoder with a class embedding of its own, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, D)
        self.class_embedding = nn.Parameter(torch.ones(D))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.patch(pixels) + self.class_embedding
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class TinyVlm(nn.Module):
    """Vision, projector, embedding, layers, norm and head; how features enter the prompt is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.projector = Vision(), nn.Linear(D, D)
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        hidden = self.merged(input_ids, self.embedding(input_ids), self.projector(self.vision(pixels)))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))

    def merged(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        mask = (input_ids == IMAGE_ID).to(hidden.device)
        hidden[mask] = features.to(hidden.device)
        return hidden


class MergesByCat(TinyVlm):
    def merged(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        return torch.cat([features[None], hidden], dim=1)


class MergesByScatter(TinyVlm):
    def merged(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        return hidden.masked_scatter((input_ids == IMAGE_ID)[..., None].to(hidden.device), features)


class MergesByIndex(TinyVlm):
    def merged(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        hidden[(input_ids == IMAGE_ID).to(hidden.device)] = features
        return hidden


class AddsPositions(TinyVlm):
    """A table of positions in a buffer that no checkpoint holds, read by the container's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.ones(D), persistent=False)

    def merged(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        return super().merged(input_ids, hidden, features) * self.rotary_emb.inv_freq


class PositionTable(nn.Module):
    """A table in no checkpoint, brought to the hidden states' device and multiplied with positions from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(D), persistent=False)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return positions[..., None].float() * self.inv_freq.to(hidden.device)


class CopiesPositions(TinyVlm):
    """A module of positions that, without an entry, has no hook to bring its inputs together."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary_emb = PositionTable()

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        hidden = self.layers[3](self.embedding(input_ids))
        return self.head(self.norm(hidden)) + self.rotary_emb(hidden, input_ids).to("cpu").sum().item()


class AddsDeepFeatures(TinyVlm):
    """Features of the vision encoder are added to the hidden states between layers."""

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        features, hidden = self.projector(self.vision(pixels)), self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
            hidden = hidden + features.mean(0)
        return self.head(self.norm(hidden))


class CrossLayer(Block):
    """Reads states that lie on the side, where no hook moves them."""

    states: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + F.softmax(hidden @ self.states.T, dim=-1) @ self.states


class ReadsCrossStates(TinyVlm):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer() for _ in range(4))

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        states, hidden = self.projector(self.vision(pixels)), self.embedding(input_ids)
        for layer in self.layers:
            layer.states = states
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


class OneCache:
    """Keys of all layers in one tensor, on the device of the first."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def update_cache(self, keys: Tensor) -> Tensor:
        self.keys = torch.cat([self.keys, keys], dim=1)
        return self.keys


class CachedLayer(Block):
    cache: OneCache

    def forward(self, hidden: Tensor) -> Tensor:
        keys = self.cache.update_cache(hidden)
        return super().forward(hidden) + keys.mean(1, keepdim=True)


class SharesCache(TinyVlm):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CachedLayer() for _ in range(4))

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        hidden = self.merged(input_ids, self.embedding(input_ids), self.projector(self.vision(pixels)))
        cache = OneCache(hidden)
        for layer in self.layers:
            layer.cache = cache
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


class PicksNextToken(TinyVlm):
    """Its own generation step, inside the model: logits meet token ids."""

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        logits = super().forward(input_ids, pixels)
        return torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)


class ForgetsDevice(TinyVlm):
    def merged(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        return super().merged(input_ids, hidden, features) + torch.arange(D).float()


class SaysCuda(TinyVlm):
    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        hidden = self.merged(input_ids, self.embedding(input_ids), self.projector(self.vision(pixels)))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden) * torch.ones(D).cuda())


class ReadsWeightOfLayer(TinyVlm):
    """Uses a layer's weight without calling the layer."""

    def forward(self, input_ids: Tensor, pixels: Tensor) -> Tensor:
        hidden = super().merged(input_ids, self.embedding(input_ids), self.projector(self.vision(pixels)))
        return self.head(self.norm(F.linear(hidden, self.projector.weight)))


class ReadsItsOwnTable(TinyVlm):
    """A bare parameter of a container whose parts lie on several devices."""

    def __init__(self) -> None:
        super().__init__()
        self.language = nn.Module()
        self.language.newline = nn.Parameter(torch.ones(D))

    def merged(self, input_ids: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        return super().merged(input_ids, hidden, features) + self.language.newline


BASE = {"vision": 0, "projector": 0, "embedding": 0, "norm": 1, "head": 1}
LAYERS = {f"layers.{i}": i // 2 for i in range(4)}


@dataclass(frozen=True)
class Case:
    """A module, a map, and what must be said of them: the operation, its class, and text of the line."""

    model: Callable[[], nn.Module]
    changes: dict[str, Any]
    op: str
    hazard: Hazard
    line: str
    removed: tuple[str, ...] = ()

    @property
    def device_map(self) -> dict[str, Any]:
        entries = {**BASE, **LAYERS, **self.changes}
        return {name: place for name, place in entries.items() if name not in self.removed}


CASES = {
    "merge by cat": Case(MergesByCat, {"projector": 1}, "cat", "merge", "torch.cat([features"),
    "merge by masked_scatter": Case(
        MergesByScatter, {"vision": 1, "projector": 1}, "masked_scatter", "merge", "hidden.masked_scatter("
    ),
    "merge by index assignment": Case(
        MergesByIndex, {"vision": 1, "projector": 1}, "index_put", "merge", "hidden[(input_ids == IMAGE_ID)"
    ),
    "residual cut": Case(
        TinyVlm, {"layers.1.up": 0, "layers.1.down": 1}, "add", "nosplit", "hidden + self.down", ("layers.1",)
    ),
    "bare parameter of a cut encoder": Case(
        TinyVlm,
        {"vision.patch": 0, "vision.class_embedding": 1, "vision.blocks": 1},
        "add",
        "bareparam",
        "self.patch(pixels) + self.class_embedding",
        ("vision",),
    ),
    "bare parameter of a container": Case(
        ReadsItsOwnTable, {"language.newline": 1}, "add", "bareparam", "+ self.language.newline"
    ),
    "position buffer elsewhere": Case(AddsPositions, {"rotary_emb": 1}, "mul", "rope", "* self.rotary_emb.inv_freq"),
    "position buffer without an entry": Case(AddsPositions, {}, "mul", "rope", "* self.rotary_emb.inv_freq"),
    "position table copied from the host": Case(
        CopiesPositions, {}, "mul", "rope", "positions[..., None].float() * self.inv_freq.to"
    ),
    "deep features": Case(
        AddsDeepFeatures, {"vision": 1, "projector": 1}, "add", "crosslayer", "hidden + features.mean(0)"
    ),
    "cross-attention states": Case(ReadsCrossStates, {}, "mm", "crosslayer", "F.softmax(hidden @ self.states.T"),
    "KV cache of all layers on one device": Case(SharesCache, {}, "cat", "kvcache", "torch.cat([self.keys, keys]"),
    "head away from the inputs": Case(PicksNextToken, {}, "cat", "genio", "torch.cat([input_ids, logits"),
    "tensor made without a device": Case(ForgetsDevice, {}, "add", "hardcuda", "torch.arange(D).float()"),
    "hard-coded device": Case(SaysCuda, {}, "mul", "hardcuda", "torch.ones(D).cuda()"),
    "weight read past its module": Case(
        ReadsWeightOfLayer, {"projector": 1}, "mm", "bareparam", "F.linear(hidden, self.projector.weight)"
    ),
}

BEYOND_MAPS = {"tensor made without a device"}
"""Only the code can be mended."""


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([[1, IMAGE_ID, IMAGE_ID, 5]]),
        "pixels": torch.randn(2, 4, generator=generator),
    }


def diagnosed(model: nn.Module, device_map: Any) -> Diagnosis:
    return diagnose(model.eval(), inputs(), device_map)


@pytest.mark.parametrize("name", CASES)
def test_hazard_is_flagged_with_its_operation_line_and_class(name: str) -> None:
    case = CASES[name]
    diagnosis = diagnosed(case.model(), case.device_map)
    assert not diagnosis.safe
    found = [f for f in diagnosis.of("will fail") if f.title.startswith(f"{case.op}:") and case.line in f.place]
    assert found, [(f.title, f.place, f.evidence) for f in diagnosis.findings]
    assert found[0].hazard == case.hazard
    assert "test_operations.py:" in found[0].place


@pytest.mark.parametrize("name", [name for name in CASES if name not in BEYOND_MAPS])
def test_repaired_twin_is_clean(name: str) -> None:
    case = CASES[name]
    model = case.model()
    repair = diagnosed(model, case.device_map).repair
    assert repair is not None and repair.proven
    again = diagnosed(model, repair.device_map)
    assert again.safe, [(f.title, f.place) for f in again.findings]
    assert len(set(repair.device_map.values())) == 2


@pytest.mark.parametrize("name", BEYOND_MAPS)
def test_what_no_map_mends_is_said_to_be_so(name: str) -> None:
    case = CASES[name]
    diagnosis = diagnosed(case.model(), case.device_map)
    assert "No map mends this" in diagnosis.of("will fail")[0].fix
    assert diagnosis.repair is not None and not diagnosis.repair.proven


def test_the_healthy_module_is_clean_under_the_plain_map() -> None:
    diagnosis = diagnosed(TinyVlm(), {**BASE, **LAYERS})
    assert diagnosis.verdict == "clean"
    assert diagnosis.repair is None


def test_every_failure_is_found_in_one_pass() -> None:
    changes = {"vision": 1, "projector": 1, "layers.1.up": 0, "layers.1.down": 1, "layers.3.up": 1, "layers.3.down": 0}
    entries = {**BASE, **LAYERS, **changes}
    diagnosis = diagnosed(MergesByIndex(), {n: d for n, d in entries.items() if n not in ("layers.1", "layers.3")})
    assert {finding.hazard for finding in diagnosis.of("will fail")} == {"merge", "nosplit"}
    residuals = next(finding for finding in diagnosis.findings if finding.hazard == "nosplit")
    assert {"layers.1", "layers.3"} <= set(residuals.modules)
    assert diagnosis.repair is not None and diagnosis.repair.proven


def test_the_repair_moves_the_fewest_bytes() -> None:
    model = MergesByCat()
    repair = diagnosed(model, {**BASE, **LAYERS, "projector": 1}).repair
    assert repair is not None
    moved = sum(p.numel() * p.element_size() for p in model.projector.parameters())
    embedding = model.embedding.weight
    assert moved < embedding.numel() * embedding.element_size()
    assert [(move.module, move.source, move.target) for move in repair.moves] == [("projector", 1, 0)]
    assert repair.moved_bytes == moved
    assert "-projector: 1\n+projector: 0" in diagnosed(model, {**BASE, **LAYERS, "projector": 1}).diff
