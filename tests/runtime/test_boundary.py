"""Boundaries: what moves, how often, and what is left alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from runtime.boundary import attach_boundaries
from runtime.links import Links, direct_copy
from runtime.virtual import virtual_gpus

NUM_LAYERS = 8


class CountedCopies:
    """Direct copies, counted by the shape of what was copied and where to."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def __call__(self, tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
        self.counts[tuple(tensor.shape), str(target)] += 1
        return direct_copy(tensor, target)


@pytest.fixture(scope="module")
def whole() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=NUM_LAYERS, **sizes)).eval()


def split_in_two(whole: LlamaForCausalLM, copies: CountedCopies) -> LlamaForCausalLM:
    """The first half of the layers with the embedding on one device, the rest on another."""
    first, second = virtual_gpus([2**28] * 2).devices
    device_map = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    device_map |= {f"model.layers.{i}": first if i < NUM_LAYERS // 2 else second for i in range(NUM_LAYERS)}
    model = LlamaForCausalLM(whole.config).eval()
    model.load_state_dict(whole.state_dict())
    for name, device in device_map.items():
        model.get_submodule(name).to(device)
    attach_boundaries(model, device_map, first, Links(copies))
    return model


def test_each_tensor_crosses_once_however_many_layers_read_it(whole: LlamaForCausalLM) -> None:
    copies = CountedCopies()
    split = split_in_two(whole, copies)
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        found = split(input_ids=ids.to("vgpu:0"), attention_mask=mask.to("vgpu:0")).logits
        expected = whole(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found.cpu(), expected)
    assert found.device == torch.device("vgpu:0")
    crossings = {shape: count for (shape, target), count in copies.counts.items() if target == "vgpu:1"}
    # Cosines and sines have one shape; hidden states, mask and positions cross once each.
    assert crossings[(2, 6, 32)] == 1
    assert crossings[(2, 1, 6, 6)] == 1
    assert max(crossings.values()) == 2
    assert copies.counts[(2, 6, 40), "vgpu:0"] == 1


def test_a_cache_stays_where_its_layers_are(whole: LlamaForCausalLM) -> None:
    copies = CountedCopies()
    split = split_in_two(whole, copies)
    cache = DynamicCache(config=split.config)
    with torch.no_grad():
        split(input_ids=torch.arange(6).view(1, 6).to("vgpu:0"), past_key_values=cache)
        copies.counts.clear()
        split(input_ids=torch.ones(1, 1, dtype=torch.long, device="vgpu:0"), past_key_values=cache)
    where = [layer.keys.device.index for layer in cache.layers]
    assert where == [0] * (NUM_LAYERS // 2) + [1] * (NUM_LAYERS // 2)
    assert all(len(shape) < 4 for shape, _ in copies.counts)


def test_within_a_stage_arguments_are_passed_on_as_they_are(whole: LlamaForCausalLM) -> None:
    copies = CountedCopies()
    split = split_in_two(whole, copies)
    seen: list[tuple[Any, Any]] = []
    for index in (0, 1):
        split.model.layers[index].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs["position_embeddings"])), with_kwargs=True
        )
    with torch.no_grad():
        split(input_ids=torch.arange(6).view(1, 6).to("vgpu:0"))
    assert seen[0][1] is seen[1][1]


def test_other_peoples_hooks_see_tensors_where_the_module_is(whole: LlamaForCausalLM) -> None:
    split = split_in_two(whole, CountedCopies())
    devices: list[torch.device] = []
    split.model.layers[NUM_LAYERS - 1].register_forward_pre_hook(lambda module, args: devices.append(args[0].device))
    split.model.layers[NUM_LAYERS // 2].register_forward_pre_hook(lambda module, args: devices.append(args[0].device))
    with torch.no_grad():
        split(input_ids=torch.arange(6).view(1, 6).to("vgpu:0"))
    assert devices == [torch.device("vgpu:1")] * 2


class Nested(nn.Module):
    """Takes a tensor inside a list inside a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, features: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        return self.inner(features["x"][0])


def test_tensors_deep_in_arguments_are_brought() -> None:
    first, second = virtual_gpus([2**20] * 2).devices
    model = nn.ModuleDict({"nested": Nested().to(second)})
    attach_boundaries(model, {"nested": second}, first)
    assert model["nested"]({"x": [torch.ones(2, device=first)]}).device == second
