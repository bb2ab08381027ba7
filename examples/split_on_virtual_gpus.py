"""Run a plan before renting the machine: a small random checkpoint in the official format, split over virtual GPUs.

The split model answers a question about a picture; the tokens are compared with those of the unsplit model.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from planner import Machine, Workload
from runtime import load_sharded, place_inputs
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint

with tempfile.TemporaryDirectory() as scratch:
    folder = write_random_checkpoint(Path(scratch) / "tiny-xcomposer2", num_layers=8)
    picture = Path(scratch) / "circle.png"
    image = Image.new("RGB", (96, 64), "navy")
    ImageDraw.Draw(image).ellipse((30, 10, 70, 50), fill="orange")
    image.save(picture)
    processor = XComposer2Processor.from_folder(folder)
    inputs = processor("What do you see?", picture)
    workload = Workload(prompt_tokens=inputs["input_ids"].shape[1] - processor.num_image_tokens, new_tokens=12)

    answers = {}
    for name, machine, devices in (("unsplit", "4GiB", "cpu"), ("split", "2x2GiB", "virtual")):
        model = load_sharded(folder, machine=Machine.parse(machine), workload=workload, devices=devices, verify=True)
        answer = model.generate(**place_inputs(model, inputs), max_new_tokens=12, do_sample=False)
        answers[name] = answer.cpu()
        used = ", ".join(map(str, dict.fromkeys(model.hf_device_map.values())))
        print(f"{name:>8} on {used}: {answer[0, -12:].tolist()}")
    for gpu, planned in model.plan.memory.items():
        peak = torch.vgpu.max_memory_allocated(gpu)
        tensors = planned.total_bytes - planned.workspace_bytes - planned.context_bytes - planned.reserve_bytes
        print(f"vgpu:{gpu} peaked at {peak:,} bytes in blocks of 512; the plan: {tensors:,} and workspace for rounding")
    assert torch.equal(answers["unsplit"], answers["split"]), "the split model answered differently"
    print("Same tokens, split and unsplit.")
