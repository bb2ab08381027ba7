"""The model families that transformers has no class for, in fewer bits: split over virtual GPUs, each as on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from planner import Machine, Workload
from runtime import inspect_placement, load_sharded, place_inputs
from runtime.quantised import held_tensors
from runtime.quiet import quiet_libraries
from tests.runtime.test_split_families import CASES, prompt_of
from vlm.families import FAMILIES

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'plan-devices[quantized]'")

WIDER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "ffn_hidden_size": 128,
    "kv_channels": 16,
}
"""bitsandbytes multiplies on the CPU by blocks of 64 weights."""
CLOSE = 0.05


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quiet_libraries():
        yield
    gc.collect()


def checkpoint_of(name: str, folder: Path) -> PreTrainedModel:
    """The family's tiny model in `folder`, and here."""
    architecture, settings, _ = CASES[name]
    family = FAMILIES[architecture]
    config_class = getattr(import_module(f"{family.package}.configuration"), family.config_class)
    model_class = getattr(import_module(f"{family.package}.modeling"), family.model_class)
    wider = {key: value for key, value in WIDER.items() if key in settings}
    if "visual" in settings:
        wider["visual"] = {**settings["visual"], "output_dim": WIDER["hidden_size"]}
    model = model_class(config_class.from_dict({**settings, **wider, "eos_token_id": None}))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1, generator=generator)
    model.to(torch.bfloat16).eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("name", CASES)
def test_a_quantised_family_split_answers_as_it_does_on_the_cpu(name: str, quantize: Any, tmp_path: Path) -> None:
    model = checkpoint_of(name, tmp_path)
    inputs = prompt_of(name, model)
    sizes = {"batch_size": 2, "num_images": 1 if CASES[name][2] else 0, "prompt_tokens": 20, "new_tokens": 4}
    workload = Workload(**sizes, dtype="bfloat16", quantize=quantize)
    split = load_sharded(tmp_path, machine=Machine.parse("2x2GiB"), workload=workload, devices="virtual", verify=True)
    assert len({device for placement in inspect_placement(split) for device in placement.found}) == 2
    whole = load_sharded(tmp_path, split.plan, devices="cpu")
    held = sum(tensor.nbytes for value in whole.parameters() for tensor in held_tensors(value))
    planned = sum(part.weights_bytes for part in split.plan.memory.values())
    buffers = sum(buffer.nbytes for buffer in whole.buffers())
    assert held <= planned <= held + buffers
    with torch.no_grad():
        found, expected = split(**place_inputs(split, inputs)).logits.cpu(), whole(**inputs).logits
    if quantize == "int8":
        assert torch.equal(found, expected)
    else:  # on the CPU four bits are multiplied by a kernel of its own
        assert (found - expected).abs().max() < CLOSE * expected.abs().max()
