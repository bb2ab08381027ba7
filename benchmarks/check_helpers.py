"""The device-map helpers that models are published with, as rules, and what a diagnosis says of their maps.

    python benchmarks/check_helpers.py           writes docs/helpers.md
    python benchmarks/check_helpers.py --print   prints it

InternLM-XComposer2's maps are run on our implementation at full size, without weights. InternVL's are run on a small
module of its remote code's layout around transformers' own vision and language models.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path

import accelerate
import torch
import transformers
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel, Qwen2Config, Qwen2ForCausalLM

from planner.diagnosis.diagnosis import Diagnosis
from planner.machine import Machine
from planner.workload import Workload
from runtime.diagnosis.diagnosis import diagnose
from runtime.quiet import quiet_libraries
from runtime.rehearsal import Rehearsal, rehearsal
from vlm.model import find_model

PAGE = Path(__file__).parents[1] / "docs" / "helpers.md"
XCOMPOSER2 = "internlm-xcomposer2-vl-7b"
IMAGE_ID, WIDTH = 3, 16


def xcomposer_helper(num_gpus: int, *, bare: tuple[str, ...] = ()) -> dict[str, int]:
    """The rule of InternLM-XComposer2's `auto_configure_device_map`; `bare` are the entries that 2.5's adds on GPU 0.

    32 layers at 38 / num_gpus a GPU, of which GPU 0 counts 3 as used; vision and embedding first, norm and head last.
    """
    device_map = {"vit": 0, "vision_proj": 0, "model.tok_embeddings": 0, **dict.fromkeys(bare, 0)}
    device_map |= {"model.norm": num_gpus - 1, "output": num_gpus - 1}
    used, gpu = 3.0, 0
    for layer in range(32):
        if used >= 38 / num_gpus:
            used, gpu = 0.0, gpu + 1
        device_map[f"model.layers.{layer}"] = gpu
        used += 1
    return device_map


def xcomposer1_helper(num_gpus: int) -> dict[str, int]:
    """The same rule as version 1 had it, by version 1's names: GPU 0 counts 6 as used, and holds norm and head too."""
    ends = ("visual_encoder", "ln_vision", "Qformer", "query_tokens", "flag_image_start", "flag_image_end")
    inner = ("model.embed_tokens", "model.norm", "lm_head")
    device_map = dict.fromkeys((*ends, "internlm_proj", *(f"internlm_model.{name}" for name in inner)), 0)
    used, gpu = 6.0, 0
    for layer in range(32):
        if used >= 38 / num_gpus:
            used, gpu = 0.0, gpu + 1
        device_map[f"internlm_model.model.layers.{layer}"] = gpu
        used += 1
    return device_map


def internvl_helper(num_layers: int, num_gpus: int, *, with_rotary: bool) -> dict[str, int]:
    """The rule of InternVL's `split_model`: GPU 0 counts half; the README's version lacks `rotary_emb`."""
    per_gpu = ceil(num_layers / (num_gpus - 0.5))
    counts = [ceil(per_gpu * 0.5), *[per_gpu] * (num_gpus - 1)]
    gpus = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    device_map = {f"language_model.model.layers.{layer}": gpu for layer, gpu in enumerate(gpus)}
    inner = ("model.tok_embeddings", "model.embed_tokens", "output", "model.norm", "lm_head")
    device_map |= dict.fromkeys(("vision_model", "mlp1", *(f"language_model.{name}" for name in inner)), 0)
    device_map |= {"language_model.model.rotary_emb": 0} if with_rotary else {}
    return device_map | {f"language_model.model.layers.{num_layers - 1}": 0}


class OlderRotary(nn.Module):
    """Rotary tables as transformers 4.45 computed them: the frequencies are used wherever they lie."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        frequencies = 1e4 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (self.inv_freq[None, :, None] @ position_ids[:, None, :].float()).transpose(1, 2)
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(hidden.dtype), both.sin().to(hidden.dtype)


class RemoteInternVl(nn.Module):
    """InternVL as its remote code lays it out: `vision_model`, `mlp1`, `language_model`, merged by index assignment."""

    def __init__(self, num_layers: int, *, older_rotary: bool = False) -> None:
        super().__init__()
        vision = InternVLVisionConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=[28, 28]
        )
        text = Qwen2Config(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.vision_model = InternVLVisionModel(vision)
        self.mlp1 = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.language_model = Qwen2ForCausalLM(text)
        if older_rotary:
            self.language_model.model.rotary_emb = OlderRotary(WIDTH // 2)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        features = self.mlp1(self.vision_model(pixel_values).last_hidden_state[:, 1:])
        hidden = self.language_model.get_input_embeddings()(input_ids)
        at_image = (input_ids == IMAGE_ID).to(hidden.device)
        hidden[at_image] = features.reshape(-1, WIDTH).to(hidden.device)
        return self.language_model(inputs_embeds=hidden).logits


def internvl_inputs(model: RemoteInternVl) -> dict[str, Tensor]:
    """One image of four patches, and as many places for it in the prompt."""
    side = model.vision_model.config.image_size[0]
    num_patches = (side // model.vision_model.config.patch_size[0]) ** 2
    return {
        "input_ids": torch.tensor([[5, *[IMAGE_ID] * num_patches, 6, 7]]),
        "pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)),
    }


def diagnosed_internvl(model: RemoteInternVl, device_map: Mapping[str, int]) -> Diagnosis:
    """What a map does to a small InternVL."""
    return diagnose(model.eval(), internvl_inputs(model), device_map)


def xcomposer_rehearsed(*, bare: bool) -> Rehearsal:
    """InternLM-XComposer2-VL-7B at full size, on meta; `bare` adds the root parameters of 4KHD and 2.5."""
    model = find_model(XCOMPOSER2)
    rehearsed = rehearsal(model, model.resolved(Workload()))
    if bare:
        for name, shape in (("plora_glb_GN", (1, 1, 4096)), ("plora_sub_GN", (1, 1, 1, 4096))):
            rehearsed.skeleton.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))
    return rehearsed


def diagnosed_xcomposer(device_map: Mapping[str, int], num_gpus: int, *, bare: bool = False) -> Diagnosis:
    """What a map does to it on GPUs of 24 GiB."""
    rehearsed = xcomposer_rehearsed(bare=bare)
    machine = Machine.parse(f"{num_gpus}x24GiB")
    return diagnose(rehearsed.skeleton, rehearsed.inputs, device_map, machine=machine, steps=rehearsed.steps)


def page() -> Iterator[str]:
    """docs/helpers.md, line by line."""
    yield "# The helpers that models are published with"
    yield ""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    yield f"Written by `python benchmarks/check_helpers.py`: {versions}, accelerate {accelerate.__version__}."
    yield "Each helper is restated as its rule; its map is diagnosed by running it on virtual GPUs."
    yield from ("", "## InternLM-XComposer 2.0's `auto_configure_device_map`", "")
    yield "On InternLM-XComposer2-VL-7B, float16, 24 GiB GPUs, one image, 512 + 512 tokens. From 6 GPUs up the last one"
    yield "holds no layer at all, only the norm and the head; GPU 0 and the last are never filled like the others."
    yield ""
    yield "| GPUs | layers | GiB at peak | verdict | KV positions that fit | with our plan |"
    yield "|---:|---|---|---|---:|---:|"
    for num_gpus in range(2, 9):
        yield _xcomposer_row(num_gpus)
    yield from ("", "### Its map on 4KHD and 2.5", "")
    yield "These have two parameters at the root, `plora_glb_GN` and `plora_sub_GN`, that the 2.0 helper does not know."
    yield from _told(diagnosed_xcomposer(xcomposer_helper(2), 2, bare=True))
    yield from ("", "The 2.5 helper adds both on GPU 0:")
    bare = ("plora_glb_GN", "plora_sub_GN")
    yield from _told(diagnosed_xcomposer(xcomposer_helper(2, bare=bare), 2, bare=True))
    yield from ("", "### Version 1's names on a version 2 model", "")
    yield "The helper beside the 2.5 demo had version 1's names."
    yield from _told(diagnosed_xcomposer(xcomposer1_helper(2), 2))
    yield from ("", "## InternVL's `split_model`", "", "### Without `rotary_emb`, as in the README", "")
    yield "With rotary tables as transformers 4.45 computed them (2 GPUs, 8 layers):"
    yield from _told(diagnosed_internvl(RemoteInternVl(8, older_rotary=True), internvl_helper(8, 2, with_rotary=False)))
    yield from ("", f"With those of transformers {transformers.__version__}, which move the frequencies:")
    yield from _told(diagnosed_internvl(RemoteInternVl(8), internvl_helper(8, 2, with_rotary=False)))
    yield from ("", "### 2 GPUs and 80 layers", "")
    yield "27 slots on GPU 0 and 54 on GPU 1 are one more than there are layers. `rotary_emb` is there:"
    yield from _told(diagnosed_internvl(RemoteInternVl(80), internvl_helper(80, 2, with_rotary=True)))


def _xcomposer_row(num_gpus: int) -> str:
    device_map = xcomposer_helper(num_gpus)
    diagnosis = diagnosed_xcomposer(device_map, num_gpus)
    assert diagnosis.given is not None and diagnosis.ours is not None
    layers = [
        sum(name.startswith("model.layers.") and g == gpu for name, g in device_map.items()) for gpu in range(num_gpus)
    ]
    peaks = ", ".join(f"{load.peak.total_bytes / 2**30:.1f}" for load in diagnosis.given.loads)
    return (
        f"| {num_gpus} | {', '.join(map(str, layers))} | {peaks} | {diagnosis.verdict} "
        f"| {diagnosis.given.kv_positions:,} | {diagnosis.ours.kv_positions:,} |"
    )


def _told(diagnosis: Diagnosis) -> Iterator[str]:
    """Verdict, findings and repair, as a list."""
    yield ""
    yield f"- **{diagnosis.verdict}**"
    for finding in diagnosis.findings:
        yield f"- {finding.severity}, `{finding.hazard}`: {finding.title}"
        yield from (f"  - {line}" for line in (finding.place, *finding.evidence) if line)
        yield f"  - fix: {finding.fix}"
    if diagnosis.repair is not None:
        proof = "a run of it is clean" if diagnosis.repair.proven else "still not clean"
        yield f"- repair: {len(diagnosis.repair.moves)} changes, {proof}"


def main() -> int:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="shown")
    shown = parser.parse_args().shown
    with quiet_libraries():
        text = "\n".join(page()) + "\n"
    if shown:
        print(text, end="")
    else:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
