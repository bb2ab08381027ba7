"""The first InternLM-XComposer as a transformers model: token ids and pixels -> logits, with `generate`.

Parameter names are the official ones. It does not know where the modules are: nothing here moves a tensor to a device.

Shapes: B batch, T tokens, I and O input and output width, M images in the batch, Q queries, W their width, P positions
of an image (Q + 2), D width of the language model, S image size in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from vlm.image_positions import TakesImages, ids_for_images
from vlm.internlm.modeling import InternLMForCausalLM
from vlm.internlm_xcomposer.configuration import LORA_TARGETS, InternLMXComposerConfig
from vlm.internlm_xcomposer.qformer import QFormer
from vlm.internlm_xcomposer.vision import EvaVisionEncoder


class LoRALinear(nn.Linear):
    """A linear layer plus `lora_B(lora_A(x)) * alpha / rank`, for every row."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)
        self.lora_scaling = alpha / rank

    def forward(self, input_BTI: torch.Tensor) -> torch.Tensor:
        return super().forward(input_BTI) + self.lora_B(self.lora_A(input_BTI)) * self.lora_scaling


class InternLMXComposerForCausalLM(TakesImages, PreTrainedModel, GenerationMixin):
    """A vision encoder, a Q-Former, a projector, and InternLM with LoRA.

    Images come as `pixel_values` (M, 3, S, S), in the order of their positions in `input_ids`: runs of
    `config.image_token_id`, `config.image_tokens` long. Without `pixel_values` every id is text. All is in one dtype,
    where the official code mixes two.
    """

    config_class = InternLMXComposerConfig
    config: InternLMXComposerConfig
    base_model_prefix = "internlm_model"
    _no_split_modules = ["LlamaDecoderLayer", "EvaBlock", "QFormerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"Qformer\.bert\.embeddings\.position_ids"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: InternLMXComposerConfig) -> None:
        super().__init__(config)
        vision, qformer = config.vision_config, config.qformer_config
        vision._attn_implementation = qformer._attn_implementation = config._attn_implementation
        self.visual_encoder = EvaVisionEncoder(vision)
        self.ln_vision = nn.LayerNorm(vision.hidden_size)
        self.Qformer = QFormer(qformer)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, qformer.hidden_size))
        self.flag_image_start = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.flag_image_end = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.internlm_proj = nn.Linear(qformer.hidden_size, config.hidden_size)
        self.internlm_model = InternLMForCausalLM(config)
        if config.internlm_lora is not None:
            add_lora(self.internlm_model, config.internlm_lora)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.internlm_model.get_input_embeddings()

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.internlm_model.set_input_embeddings(new_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.internlm_model.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Features of every image, a learned beginning and end among them (M, P, D).

        As in the official code they are joined where they are: nothing is moved.
        """
        image_MLC = self.ln_vision(self.visual_encoder(pixel_values))
        seen_MQW = self.Qformer(self.query_tokens.expand(len(image_MLC), -1, -1), image_MLC)
        starts, ends = (flag.expand(len(image_MLC), -1, -1) for flag in (self.flag_image_start, self.flag_image_end))
        return BaseModelOutput(last_hidden_state=torch.cat((starts, self.internlm_proj(seen_MQW), ends), dim=1))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: all; a tensor: those positions), in the model's dtype.

        Raises: ValueError when images and image positions do not match, or pixels come with the wrong others.
        """
        if pixel_values is not None:
            ids = ids_for_images(input_ids, inputs_embeds)
            input_ids, inputs_embeds = None, self.embed_with_images(ids, pixel_values)
        return self.internlm_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def add_lora(language_model: InternLMForCausalLM, lora: dict[str, Any]) -> None:
    """Give the linear layers that `learn_param` names their low-rank parts."""
    targets = [path for name in lora.get("learn_param", []) for path in LORA_TARGETS[name]]
    for layer in language_model.model.layers:
        for path in targets:
            parent, _, name = path.rpartition(".")
            plain = layer.get_submodule(path)
            with_lora = LoRALinear(
                plain.in_features,
                plain.out_features,
                bias=plain.bias is not None,
                rank=lora["lora_r"],
                alpha=lora["lora_alpha"],
            )
            setattr(layer.get_submodule(parent), name, with_lora)
