"""Tiny checkpoints of transformers' models with all that answering needs: weights, tokenizer, processor, template.

Words are tokens, so that prompts can be counted by reading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlm.tiny import tiny_model

WORDS = "what is in the garden ? a cat sits on old tree and who holds umbrella under bridge".split()
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }} {% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}? {% endif %}"
)


def write_llava(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A LLaVA: fixed square pictures, 64 positions each."""
    model, config = tiny_model("llava", dtype=dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    tokenizer = _tokenizer(config.get_text_config().vocab_size, {"image_token": ("<image>", config.image_token_id)})
    side = config.vision_config.image_size
    pixels = LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(folder)
    return folder


def write_qwen2_vl(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Qwen2-VL: pictures of any size; its processor cannot be made without torchvision, for its video part."""
    model, config = tiny_model("qwen2_vl", dtype=dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    specials = {
        "image_token": ("<|image_pad|>", config.image_token_id),
        "video_token": ("<|video_pad|>", config.video_token_id),
        "vision_bos_token": ("<|vision_start|>", config.vision_start_token_id),
        "vision_eos_token": ("<|vision_end|>", config.vision_end_token_id),
    }
    tokenizer = _tokenizer(config.get_text_config().vocab_size, specials)
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4 * 28 * 28).save_pretrained(folder)
    return folder


def _tokenizer(vocab_size: int, specials: Mapping[str, tuple[str, int]]) -> PreTrainedTokenizerFast:
    """Words by id, fillers where no word is, and special tokens at the ids that the config gives them."""
    vocabulary: dict[str, int] = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    taken = {index for _, index in specials.values()} | set(vocabulary.values())
    free = [index for index in range(vocab_size) if index not in taken]
    vocabulary |= {word: index for word, index in zip(WORDS, free, strict=False)}
    vocabulary |= {f"w{index}": index for index in free[len(WORDS) :]}
    vocabulary |= dict(specials.values())
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named: dict[str, Any] = {name: token for name, (token, _) in specials.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=named,
    )
