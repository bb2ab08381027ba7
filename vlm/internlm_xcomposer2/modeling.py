"""InternLM2 and InternLM-XComposer2 as transformers models: token ids and pixels -> logits, with `generate`.

Parameter names are the official ones. It does not know where the modules are: nothing here moves a tensor to a device.

Shapes: B batch, T tokens, D width, V vocabulary, M images in the batch, P positions per image, S image size in pixels,
N image positions in the batch (M * P).
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config
from vlm.internlm_xcomposer2.decoder import (
    InternLM2DecoderLayer,
    InternLM2RMSNorm,
    Rotary,
    rotary_base,
    rotary_cos_sin,
)
from vlm.internlm_xcomposer2.plora import LinearFactory, PLoRALinear
from vlm.internlm_xcomposer2.vision import VisionEncoder, image_rows, image_starts, join_text_and_images


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

    def __init__(self, config: InternLM2Config, linear: LinearFactory = nn.Linear) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config, layer_idx, linear) for layer_idx in range(config.num_hidden_layers)
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
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds: got " + ("none" if input_ids is None else "both"))
        hidden_BTD = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        # Without position ids: they may be on another device, and would only serve to find packed sequences.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        shared = {
            "position_embeddings": self._rotary(hidden_BTD, position_ids, num_cached),
            "attention_mask": mask,
            "past_key_values": past_key_values,
            "image_index": image_index,
        }
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, **shared, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_BTD), past_key_values=past_key_values)

    def _rotary(self, hidden_BTD: torch.Tensor, position_ids: torch.Tensor | None, num_cached: int) -> Rotary:
        num_positions = num_cached + hidden_BTD.shape[1]
        if position_ids is None:
            position_ids = torch.arange(num_cached, num_positions, device=hidden_BTD.device)[None]
        return rotary_cos_sin(
            position_ids,
            head_dim=self.config.head_dim,
            base=rotary_base(self.config, num_positions),
            dtype=hidden_BTD.dtype,
        )


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
    """The language model with its head."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: InternLM2Config, linear: LinearFactory = nn.Linear) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config, linear)
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.output(outputs.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits_BTV, past_key_values=outputs.past_key_values)


class InternLMXComposer2ForCausalLM(InternLM2ForCausalLM):
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
        super().__init__(config, partial(PLoRALinear, rank=config.plora_rank, alpha=config.plora_alpha))
        clip_config = config.clip_config()
        clip_config._attn_implementation = config._attn_implementation
        self.vit = VisionEncoder(clip_config)
        self.vision_proj = nn.Sequential(
            nn.Linear(clip_config.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.post_init()

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
            if input_ids is None or inputs_embeds is not None or im_mask is not None:
                raise ValueError("pixel_values go with input_ids alone: not with inputs_embeds, nor with im_mask")
            inputs_embeds, image_index_N = self._embed_with_images(input_ids, pixel_values)
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

    def _expand_inputs_for_generation(  # type: ignore[override]  # transformers calls it by keyword
        self, expand_size: int = 1, input_ids: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Inputs of `expand_size` beams per sample, each with its sample's images, however many they are."""
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and input_ids is not None and expand_size > 1:
            _, starts = self._find_images(input_ids, len(pixel_values))
            per_sample = Counter(start // input_ids.shape[1] for start in starts)
            images = pixel_values.split([per_sample[sample] for sample in range(len(input_ids))])
            pixel_values = torch.cat([sample_images.repeat(expand_size, 1, 1, 1) for sample_images in images])
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size,
            input_ids=input_ids,  # type: ignore[arg-type]
            **kwargs,
        )
        return input_ids, kwargs if pixel_values is None else {**kwargs, "pixel_values": pixel_values}

    def _embed_with_images(
        self, input_ids_BT: torch.Tensor, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image_index_N, starts = self._find_images(input_ids_BT, len(pixel_values))
        features_MPD = self.vision_proj(self.vit(pixel_values))
        return join_text_and_images(self.model.tok_embeddings, input_ids_BT, features_MPD, starts), image_index_N

    def _find_images(self, input_ids_BT: torch.Tensor, num_images: int) -> tuple[torch.Tensor, list[int]]:
        image_index_N = (input_ids_BT == self.config.image_token_id).flatten().nonzero().squeeze(1)
        starts = image_starts(
            image_index_N.tolist(),
            num_images=num_images,
            image_tokens=self.config.image_tokens,
            num_tokens=input_ids_BT.shape[1],
        )
        return image_index_N, starts
