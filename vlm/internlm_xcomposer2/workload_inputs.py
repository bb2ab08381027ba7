"""A workload -> the keyword arguments of our models' forward: images first, then text, as many as planned."""

from __future__ import annotations

import torch

from planner.workload import Workload
from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config


def workload_inputs(config: InternLM2Config, workload: Workload) -> dict[str, torch.Tensor]:
    """Prefill inputs of a resolved workload; in a batch the first prompt is one token shorter, so that a mask exists.

    Shape: input_ids and attention_mask (B, T), pixel_values (B * images, 3, S, S); pixels are zeros.
    """
    text = torch.full((workload.batch_size, workload.prompt_tokens), config.bos_token_id)
    inputs = {"input_ids": text}
    if isinstance(config, InternLMXComposer2Config) and workload.num_images:
        positions = workload.num_images * config.image_tokens
        images = torch.full((workload.batch_size, positions), config.image_token_id)
        inputs["input_ids"] = torch.cat([images, text], dim=1)
        side = config.img_size
        inputs["pixel_values"] = torch.zeros(workload.batch_size * workload.num_images, 3, side, side)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if workload.batch_size > 1:
        inputs["attention_mask"][0, -workload.prompt_tokens] = 0
    return inputs
