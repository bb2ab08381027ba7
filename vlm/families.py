"""Architectures that transformers has no class for, and where ours are: names only, so that planning needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where an architecture's classes are: a package, and their names in its modules.

    The modules are `configuration`, `modeling` and `processing`. `sees` says that every model of the architecture takes
    images, of which an official config may say nothing. `dtype` is meant where a checkpoint is stored in 32 bits.
    """

    package: str
    config_class: str
    model_class: str
    processor_class: str
    sees: bool = False
    dtype: str = "bfloat16"


FAMILIES: Mapping[str, Family] = {
    "InternLM2ForCausalLM": Family(
        package="vlm.internlm_xcomposer2",
        config_class="InternLM2Config",
        model_class="InternLM2ForCausalLM",
        processor_class="XComposer2Processor",
        dtype="float16",
    ),
    "InternLMXComposer2ForCausalLM": Family(
        package="vlm.internlm_xcomposer2",
        config_class="InternLMXComposer2Config",
        model_class="InternLMXComposer2ForCausalLM",
        processor_class="XComposer2Processor",
        sees=True,
        dtype="float16",
    ),
    "InternLMXComposer2HDForCausalLM": Family(
        package="vlm.internlm_xcomposer2_hd",
        config_class="InternLMXComposer2HDConfig",
        model_class="InternLMXComposer2HDForCausalLM",
        processor_class="XComposer2HDProcessor",
        sees=True,
        dtype="float16",
    ),
    "InternLMForCausalLM": Family(
        package="vlm.internlm",
        config_class="InternLMConfig",
        model_class="InternLMForCausalLM",
        processor_class="InternLMProcessor",
        dtype="float16",
    ),
    "InternLMXComposerForCausalLM": Family(
        package="vlm.internlm_xcomposer",
        config_class="InternLMXComposerConfig",
        model_class="InternLMXComposerForCausalLM",
        processor_class="XComposerProcessor",
        sees=True,
        dtype="float16",
    ),
    "ChatGLMModel": Family(
        package="vlm.chatglm",
        config_class="ChatGLMConfig",
        model_class="ChatGLMForConditionalGeneration",
        processor_class="ChatGLMProcessor",
    ),
    "ChatGLMForConditionalGeneration": Family(
        package="vlm.chatglm",
        config_class="ChatGLMConfig",
        model_class="ChatGLMForConditionalGeneration",
        processor_class="ChatGLMProcessor",
    ),
    "QWenLMHeadModel": Family(
        package="vlm.qwen",
        config_class="QWenConfig",
        model_class="QWenLMHeadModel",
        processor_class="QWenProcessor",
    ),
}
"""By the name in a config's `architectures`."""
