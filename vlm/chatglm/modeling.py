"""GLM-4-9B and GLM-4V-9B as transformers models: token ids and pixels -> logits, with `generate`.

Parameter names are the official ones. It does not know where the modules are: nothing here moves a tensor to a device.

Shapes: B batch, T tokens, D width, H heads, K key/value heads, E head width, M images in the batch, P positions of an
image, S image size in pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.glm.modeling_glm import GlmRMSNorm, apply_rotary_pos_emb
from transformers.utils import can_return_tuple

from vlm.attention import attend, split_heads
from vlm.causal_lm import begin_step, embedded, following_positions, kept_positions
from vlm.chatglm.configuration import ChatGLMConfig
from vlm.chatglm.vision import EvaVisionModel
from vlm.image_positions import TakesImages, ids_for_images
from vlm.rotary import Rotary, rotary_cos_sin


class ChatGLMAttention(nn.Module):
    """Grouped-query attention over one projection: all queries, then all keys, then all values.

    The first half of a head's components is turned by position, neighbours in pairs.
    """

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        shared = config.num_key_value_heads * self.head_dim
        self.widths = [config.num_attention_heads * self.head_dim, shared, shared]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=config.add_qkv_bias)
        self.dense = nn.Linear(self.widths[0], config.hidden_size, bias=False)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        position_embeddings: Rotary,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        packed = self.query_key_value(hidden_BTD).split(self.widths, dim=-1)
        query_BHTE, key_BKTE, value_BKTE = (split_heads(part, self.head_dim) for part in packed)
        query_BHTE, key_BKTE = apply_rotary_pos_emb(query_BHTE, key_BKTE, *position_embeddings)
        if past_key_values is not None:
            key_BKTE, value_BKTE = past_key_values.update(key_BKTE, value_BKTE, self.layer_idx)
        return self.dense(attend(self, query_BHTE, key_BKTE, value_BKTE, attention_mask, **kwargs))


class ChatGLMMLP(nn.Module):
    """Gated feed-forward over one projection: the gate, then what it gates."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        gate, gated = self.dense_h_to_4h(hidden_BTD).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * gated)


class ChatGLMBlock(nn.Module):
    """Attention and feed-forward, each on normalised input and added to its own."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = GlmRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = GlmRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_BTD: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        hidden_BTD = hidden_BTD + self.self_attention(self.input_layernorm(hidden_BTD), **attention_kwargs)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class ChatGLMEmbedding(nn.Module):
    """Token ids -> embeddings."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(input_ids)


class ChatGLMEncoder(nn.Module):
    """All decoder layers and the final norm; the name is the official one."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.final_layernorm = GlmRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_BTD: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, **attention_kwargs)
        return self.final_layernorm(hidden_BTD)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers has to know about every model here."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    # EvaPatchEmbedding adds bare parameters to what its children return
    _no_split_modules = ["ChatGLMBlock", "EvaLayer", "EvaPatchEmbedding"]
    _skip_keys_device_placement = ["past_key_values"]
    # Of the official code's rotary module; here cosines and sines are made where they are needed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The language model, and beside it, as officially, the vision encoder and the head, which the parent calls."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embedding = ChatGLMEmbedding(config)
        self.encoder = ChatGLMEncoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.vision_config is not None:
            config.vision_config._attn_implementation = config._attn_implementation
            self.vision = EvaVisionModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.embedding.word_embeddings = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, and the cache.

        Raises: ValueError for a step after others without position ids, where images may have shared some.
        """
        hidden_BTD = embedded(self.embedding, input_ids, inputs_embeds)
        step = begin_step(self.config, hidden_BTD, attention_mask, past_key_values, use_cache)
        if position_ids is None:
            if step.num_cached and self.config.vision_config is not None:
                raise ValueError(
                    f"position_ids are missing: {step.num_cached} positions are cached, but the patches of an image "
                    "share one id, so their number does not tell the next. Give position_ids, as generate() does"
                )
            position_ids = following_positions(hidden_BTD, step.num_cached)
        hidden_BTD = self.encoder(
            hidden_BTD,
            position_embeddings=rotary_cos_sin(
                position_ids,
                head_dim=self.config.rotary_width,
                base=self.config.rotary_base,
                dtype=hidden_BTD.dtype,
            ),
            attention_mask=step.attention_mask,
            past_key_values=step.cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, past_key_values=step.cache)


class ChatGLMForConditionalGeneration(TakesImages, ChatGLMPreTrainedModel, GenerationMixin):
    """The language model with its head, for text and, with a vision encoder, images.

    Images come as `pixel_values` (M, 3, S, S), in the order of their positions in `input_ids`: runs of
    `config.image_token_id`, `config.image_tokens` long, the beginning and the end of an image among them. All patches
    of an image share one position id; where none are given, they are made so from `input_ids`.
    """

    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.transformer.output_layer = new_embeddings

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Features of every image, its beginning and end among them (M, P, D)."""
        if self.config.vision_config is None:
            raise ValueError("pixel_values were given, but this model has no vision_config: it reads text alone")
        return BaseModelOutput(last_hidden_state=self.transformer.vision(pixel_values))

    @can_return_tuple
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
            if position_ids is None:
                position_ids = self._positions(ids, attention_mask)
            input_ids, inputs_embeds = None, self.embed_with_images(ids, pixel_values)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits_BTV = self.transformer.output_layer(kept_positions(outputs.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(logits=logits_BTV, past_key_values=outputs.past_key_values)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """transformers' position ids, but one for all patches of an image; `inputs_tensor` is the whole sequence."""
        mask = model_kwargs.get("attention_mask")
        sees = self.config.vision_config is not None and "inputs_embeds" not in model_kwargs
        if not sees or mask is not None and mask.shape != inputs_tensor.shape:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return self._positions(inputs_tensor, mask)

    def _positions(self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None) -> torch.Tensor:
        """Position ids (B, T) that count all patches of an image as one, and no padding."""
        at_image = input_ids_BT == self.config.image_token_id
        index_in_image = (at_image.cumsum(-1) - 1) % self.config.image_tokens
        repeats = at_image & (index_in_image > 1) & (index_in_image < self.config.image_tokens - 1)
        counted = ~repeats if attention_mask_BT is None else ~repeats & (attention_mask_BT != 0)
        return (counted.cumsum(-1) - 1).clamp(min=0)
