"""Qwen and Qwen-VL as transformers models: token ids and pixels -> logits, with `generate`.

Parameter names are the official ones. It does not know where the modules are: nothing here moves a tensor to a device.

Shapes: B batch, T tokens, D width, H heads, E head width, M images in the batch, Q positions of an image, S image size
in pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import can_return_tuple

from vlm.attention import attend, split_heads
from vlm.causal_lm import Step, begin_step, embedded, following_positions, kept_positions
from vlm.image_positions import TakesImages, ids_for_images
from vlm.qwen.configuration import QWenConfig
from vlm.qwen.vision import QWenVision
from vlm.rotary import Rotary, rotary_cos_sin, rotate


class QWenAttention(nn.Module):
    """Attention over one projection: all queries, then all keys, then all values.

    As officially, positions turn queries and keys in float32.
    """

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.is_causal = True
        width = config.num_attention_heads * config.kv_channels
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        position_embeddings: Rotary,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        query_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        packed = self.c_attn(hidden_BTD).chunk(3, dim=-1)
        query_BHTE, key_BHTE, value_BHTE = (split_heads(part, self.head_dim) for part in packed)
        query_BHTE = rotate(query_BHTE.float(), position_embeddings).to(value_BHTE.dtype)
        key_BHTE = rotate(key_BHTE.float(), position_embeddings).to(value_BHTE.dtype)
        if query_scale is not None:
            query_BHTE = query_BHTE * query_scale
        if past_key_values is not None:
            key_BHTE, value_BHTE = past_key_values.update(key_BHTE, value_BHTE, self.layer_idx)
        return self.c_proj(attend(self, query_BHTE, key_BHTE, value_BHTE, attention_mask, **kwargs))


class QWenMLP(nn.Module):
    """Gated feed-forward: c_proj(w1 x * silu(w2 x))."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        inner_width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, inner_width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, inner_width, bias=bias)
        self.c_proj = nn.Linear(inner_width, config.hidden_size, bias=bias)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(hidden_BTD) * F.silu(self.w2(hidden_BTD)))


class QWenBlock(nn.Module):
    """Attention and feed-forward, each on normalised input and added to its own."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = LlamaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = LlamaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_BTD: torch.Tensor, **attention_kwargs: Any) -> torch.Tensor:
        hidden_BTD = hidden_BTD + self.attn(self.ln_1(hidden_BTD), **attention_kwargs)
        return hidden_BTD + self.mlp(self.ln_2(hidden_BTD))


class QWenPreTrainedModel(PreTrainedModel):
    """What transformers has to know about every model here."""

    config_class = QWenConfig
    config: QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    # Resampler adds bare parameters to what its children return
    _no_split_modules = ["QWenBlock", "VisualAttentionBlock", "Resampler"]
    _skip_keys_device_placement = ["past_key_values"]
    # Of the official code's rotary and attention modules; here they are made where they are needed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"attn\.(masked_bias|logn_tensor)"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class QWenModel(QWenPreTrainedModel):
    """The language model without its head, and the vision encoder if there is one."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.ln_f = LlamaRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if config.visual is not None:
            config.visual._attn_implementation = config._attn_implementation
            self.visual = QWenVision(config.visual)
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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, and the cache."""
        hidden_BTD = embedded(self.wte, input_ids, inputs_embeds)
        step = begin_step(self.config, hidden_BTD, attention_mask, past_key_values, use_cache)
        if position_ids is None:
            position_ids = following_positions(hidden_BTD, step.num_cached)
        shared = {
            "position_embeddings": rotary_cos_sin(
                position_ids,
                head_dim=self.config.kv_channels,
                base=self._rotary_base(step, position_ids),
                dtype=torch.float32,
            ),
            "attention_mask": step.attention_mask,
            "past_key_values": step.cache,
        }
        if self.config.use_logn_attn and step.num_cached + hidden_BTD.shape[1] > self.config.seq_length:
            shared["query_scale"] = query_scale(position_ids, self.config.seq_length).to(hidden_BTD.dtype)
        for block in self.h:
            hidden_BTD = block(hidden_BTD, **shared, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_BTD), past_key_values=step.cache)

    def _rotary_base(self, step: Step, position_ids_BT: torch.Tensor) -> float | torch.Tensor:
        """The base for this step, one for all samples or one each (B, 1, 1).

        It is the prompt's length that stretches it: later steps use what their keys had. So it belongs to the cache,
        and is kept there, as numbers, which lie on no device. The official code keeps it in the model.
        """
        config = self.config
        bases = (config.rotary_emb_base,)
        if config.use_dynamic_ntk and step.num_cached:
            bases = getattr(step.cache, "qwen_rotary_bases", bases)
        elif config.use_dynamic_ntk and position_ids_BT.shape[1] > config.seq_length:
            bases = stretched_bases(config, position_ids_BT)
            if step.cache is not None:
                step.cache.qwen_rotary_bases = bases  # type: ignore[attr-defined]
        if len(bases) == 1:
            return bases[0]
        return torch.tensor(bases, device=position_ids_BT.device)[:, None, None]


def stretched_bases(config: QWenConfig, position_ids_BT: torch.Tensor) -> tuple[float, ...]:
    """Rotary base of each sample by its length, which grows beyond the trained one (dynamic NTK).

    Source: modeling_qwen.py of Qwen-7B (`get_ntk_alpha`), in copies such as intel/ipex-llm's qwen.py.
    """
    exponent = config.kv_channels / (config.kv_channels - 2)
    lengths = (position_ids_BT.amax(-1) + 1).tolist()
    alphas = [2 ** math.ceil(math.log2(length / config.seq_length) + 1) - 1 for length in lengths]
    return tuple(config.rotary_emb_base * max(alpha, 1) ** exponent for alpha in alphas)


def query_scale(position_ids_BT: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Factor of every query (B, 1, T, 1): beyond the trained length the logarithm of the position to that base, else 1.

    Source: modeling_qwen.py of Qwen-7B (`logn_tensor`), in copies such as intel/ipex-llm's qwen.py.
    """
    places_BT = position_ids_BT.float() + 1
    return (places_BT.log() / math.log(seq_length)).clamp(min=1)[:, None, :, None]


class QWenLMHeadModel(TakesImages, QWenPreTrainedModel, GenerationMixin):
    """The language model with its head, for text and, with `visual`, images.

    Images come as `pixel_values` (M, 3, S, S), in the order of their positions in `input_ids`: runs of
    `config.image_token_id`, `config.image_tokens` long, between the ids of an image's beginning and end. The official
    code finds file names there; and it writes features into the embeddings in place, where this concatenates.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Features of every image (M, Q, D)."""
        if self.config.visual is None:
            raise ValueError(
                "pixel_values were given, but this model has no `visual` in its config: it reads text alone"
            )
        return BaseModelOutput(last_hidden_state=self.transformer.visual(pixel_values))

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
        logits_BTV = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(logits=logits_BTV, past_key_values=outputs.past_key_values)
