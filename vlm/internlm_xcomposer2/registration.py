"""Tells transformers' Auto classes about this package's models, on request; importing it changes nothing."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config
from vlm.internlm_xcomposer2.modeling import InternLM2ForCausalLM, InternLM2Model, InternLMXComposer2ForCausalLM


class InternLM2FamilyConfig(InternLM2Config):
    """Stands for the model type `internlm2`, which two families share, and makes the configuration of the right one."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The text or the vision-language configuration, as the file's `architectures` say."""
        architectures = config_dict.get("architectures") or []
        is_composer = InternLMXComposer2ForCausalLM.__name__ in architectures
        return (InternLMXComposer2Config if is_composer else InternLM2Config).from_dict(config_dict, **kwargs)


def register_auto_classes() -> None:
    """Let AutoConfig, AutoModel and AutoModelForCausalLM load both families; a second call changes nothing.

    As in the official `auto_map`, AutoModel is the XComposer2 model with its head.
    """
    AutoConfig.register(InternLM2Config.model_type, InternLM2FamilyConfig, exist_ok=True)
    AutoModel.register(InternLM2Config, InternLM2Model, exist_ok=True)
    AutoModel.register(InternLMXComposer2Config, InternLMXComposer2ForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(InternLMXComposer2Config, InternLMXComposer2ForCausalLM, exist_ok=True)
