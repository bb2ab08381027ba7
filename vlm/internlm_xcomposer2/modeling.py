"""InternLM2 and InternLM-XComposer2 as transformers models: token ids and pixels -> logits, with `generate`.

Parameter names are the official ones. It does not know where the modules are: nothing here moves a tensor to a device.

Shapes: B batch, T tokens, D width, V vocabulary, M images in the batch, P positions of an image, S image size in
pixels, N image positions in the batch (M * P).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from vlm.causal_lm import begin_step, embedded, following_positions, kept_positions
from vlm.image_positions import TakesImages, ids_for_images
from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config
from vlm.internlm_xcomposer2.decoder import InternLM2DecoderLayer, InternLM2RMSNorm, rotary_base
from vlm.internlm_xcomposer2.plora import Linears, PLoRALinear
from vlm.internlm_xcomposer2.vision import VisionEncoder, image_rows
from vlm.rotary import Rotary, rotary_cos_sin


class InternLM2PreTrainedModel(PreTrainedModel):
    """What transformers has to know about every model here."""

    config_class = InternLM2Config
    config: InternLM2Config
    base_model_prefix = "model"
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["InternLM2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class InternLM2Model(InternLM2PreTrainedModel):
    """The language model without its head."""

    def __init__(self, config: InternLM2Config, linears: Linears | None = None) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config, layer_idx, linears or Linears())
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, and the cache; `image_index` lists the image positions among B * T."""
        hidden_BTD = embedded(self.tok_embeddings, input_ids, inputs_embeds)
        step = begin_step(self.config, hidden_BTD, attention_mask, past_key_values, use_cache)
        shared = {
            "position_embeddings": self._rotary(hidden_BTD, position_ids, step.num_cached),
            "attention_mask": step.attention_mask,
            "past_key_values": step.cache,
            "image_index": image_index,
        }
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, **shared, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BTD), past_key_values=step.cache)

    def _rotary(self, hidden_BTD: torch.Tensor, position_ids: torch.Tensor | None, num_cached: int) -> Rotary:
        if position_ids is None:
            position_ids = following_positions(hidden_BTD, num_cached)
        return rotary_cos_sin(
            position_ids,
            head_dim=self.config.head_dim,
            base=rotary_base(self.config, num_cached + hidden_BTD.shape[1]),
            dtype=hidden_BTD.dtype,
        )


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
    """The language model with its head."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: InternLM2Config, linears: Linears | None = None) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config, linears)
        self.output: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` positions (0: all; a tensor: those positions), in the model's dtype."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits_BTV = self.output(kept_positions(outputs.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(logits=logits_BTV, past_key_values=outputs.past_key_values)


def build_projector(in_features: int, out_features: int) -> nn.Sequential:
    """The two-layer projector of every XComposer2 model, as modules `0` and `2` of what it is assigned to."""
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


class InternLMXComposer2ForCausalLM(TakesImages, InternLM2ForCausalLM):
    """The language model with partial LoRA, a vision encoder and a projector.

    Images come as `pixel_values` (M, 3, S, S), in the order of their positions in `input_ids`: runs of
    `config.image_token_id`, `config.image_tokens` long. Without `pixel_values` every id is text. Embeddings that
    were joined elsewhere come as `inputs_embeds`, with `im_mask` (B, T), true at image positions.
    """

    config_class = InternLMXComposer2Config
    config: InternLMXComposer2Config
    # CLIPVisionEmbeddings adds a bare parameter to what its children return
    _no_split_modules = ["InternLM2DecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]
    # Not in the official checkpoints: the features are taken before it
    _keys_to_ignore_on_load_missing = [r"^vit\..*\.post_layernorm\."]

    def __init__(self, config: InternLMXComposer2Config) -> None:
        super().__init__(config, self._linears(config))
        self._add_vision(config)
        self.post_init()

    @staticmethod
    def _linears(config: InternLMXComposer2Config) -> Linears:
        """What the decoder's linear layers are built with."""
        plora = partial(PLoRALinear, rank=config.plora_rank, alpha=config.plora_alpha)
        return Linears(packed=plora, other=plora)

    def _add_vision(self, config: InternLMXComposer2Config) -> None:
        clip_config = config.clip_config()
        clip_config._attn_implementation = config._attn_implementation
        self.vit = VisionEncoder(clip_config)
        self.vision_proj = build_projector(clip_config.hidden_size, config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        im_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits as of `InternLM2ForCausalLM`.

        Raises: ValueError when images and image positions do not match, or image inputs come with the wrong others.
        """
        image_index_N = None
        if pixel_values is not None:
            ids = ids_for_images(input_ids, inputs_embeds, im_mask)
            inputs_embeds, image_index_N = self.embed_with_images(ids, pixel_values), self.image_index(ids)
            input_ids = None
        elif im_mask is not None:
            image_index_N = image_rows(im_mask, inputs_embeds)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            image_index=image_index_N,
            **kwargs,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]  # transformers calls it by keyword
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        im_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' inputs of one step, with `im_mask` wherever the embeddings it belongs to are used."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        used_embeds = inputs.get("inputs_embeds")
        if im_mask is not None and used_embeds is not None:
            inputs["im_mask"] = im_mask[:, -used_embeds.shape[1] :]
        return inputs

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Features of every image, one position per patch (M, P, D)."""
        return BaseModelOutput(last_hidden_state=self.vision_proj(self.vit(pixel_values)))
