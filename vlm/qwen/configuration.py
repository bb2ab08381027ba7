"""Official config.json of Qwen or Qwen-VL <-> a checked transformers configuration."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from vlm.configuration import is_number, not_equal, not_multiple, not_positive, refuse

RESAMPLER_HEAD_WIDTH = 128
"""Width of the resampler's heads, from which the official code counts them."""


class QWenVisualConfig(PreTrainedConfig):
    """Sizes of Qwen-VL's ViT-bigG and its resampler, under the official keys; the defaults are Qwen-VL's.

    `n_queries` is a constant of the official code. It is also the number of learned places, of patches and of keys,
    which are interpolated to the patches of an image. Ids are those of an image's beginning, its end and its positions,
    one after the other.
    """

    model_type = "qwen_visual"
    base_config_key = "visual"

    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    output_dim: int = 4096
    n_queries: int = 256
    image_start_id: int = 151857

    @property
    def inner_width(self) -> int:
        """Width of a block's feed-forward."""
        return int(self.width * self.mlp_ratio)

    @property
    def head_dim(self) -> int:
        """Width of one attention head of a block."""
        return self.width // self.heads

    @property
    def resampler_heads(self) -> int:
        return max(1, self.output_dim // RESAMPLER_HEAD_WIDTH)

    def problems(self) -> list[str]:
        """What is malformed or contradictory, each with its key."""
        sizes = ("image_size", "patch_size", "width", "layers", "heads", "output_dim", "n_queries")
        malformed = not_positive(vars(self), sizes)
        if not is_number(self.mlp_ratio, at_least=0):
            malformed.append(f"mlp_ratio is {self.mlp_ratio!r}; it must be a number")
        if malformed:
            return malformed
        problems = not_multiple(vars(self), "width", "heads") + not_multiple(vars(self), "image_size", "patch_size")
        if math.isqrt(self.n_queries) ** 2 != self.n_queries:
            problems.append(f"n_queries is {self.n_queries}; they lie in a square, so it must be one")
        if self.output_dim % self.resampler_heads:
            problems.append(f"output_dim {self.output_dim} is not a multiple of {RESAMPLER_HEAD_WIDTH}")
        return problems


class QWenConfig(PreTrainedConfig):
    """Sizes and constants of a Qwen model; the defaults are Qwen-7B's. Without `visual` it is a text model.

    `intermediate_size` is that of gate and gated together, as officially.
    Raises: ValueError naming every key whose value contradicts another or a rule.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs: ClassVar = {"visual": QWenVisualConfig}
    attribute_map: ClassVar = {"head_dim": "kv_channels", "rms_norm_eps": "layer_norm_epsilon"}

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: float = 10000
    seq_length: int = 8192
    max_position_embeddings: int = 32768
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    visual: Any = None  # a mapping in a file, a QWenVisualConfig here
    image_token_id: int | None = None  # at every position of an image, `<imgpad>`: the second after its beginning

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.visual, dict):
            self.visual = QWenVisualConfig(**self.visual)
        self.image_token_id = None if self.visual is None else self.visual.image_start_id + 2
        super().__post_init__(**kwargs)
        refuse(type(self).__name__, self._malformed() or self._contradictions())

    def to_dict(self) -> dict[str, Any]:
        """The configuration under its official keys; a text model has none of images."""
        derived = ("image_token_id", *(() if self.visual is not None else ("visual",)))
        return {key: value for key, value in super().to_dict().items() if key not in derived}

    @property
    def num_key_value_heads(self) -> int:
        """One for each query head."""
        return self.num_attention_heads

    @property
    def image_tokens(self) -> int:
        """Positions of an image in the sequence, without its beginning and end, which are text."""
        return 0 if self.visual is None else self.visual.n_queries

    def _malformed(self) -> list[str]:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_channels")
        problems = not_positive(vars(self), (*sizes, "intermediate_size", "seq_length", "max_position_embeddings"))
        if not is_number(self.rotary_emb_base, at_least=1):
            problems.append(f"rotary_emb_base is {self.rotary_emb_base!r}; it must be a number of at least 1")
        if self.seq_length == 1:
            problems.append("seq_length is 1; attention is scaled by the logarithm to this base")
        return problems

    def _contradictions(self) -> list[str]:
        problems = not_equal(vars(self), {"rotary_pct": 1.0, "scale_attn_weights": True})
        for key in ("intermediate_size", "kv_channels"):
            if getattr(self, key) % 2:
                problems.append(f"{key} is {getattr(self, key)}; it must be even")
        if self.visual is not None:
            problems += [f"visual: {problem}" for problem in self.visual.problems()]
            if self.visual.output_dim != self.hidden_size:
                problems.append(f"visual: output_dim {self.visual.output_dim} is not hidden_size {self.hidden_size}")
            if self.visual.image_start_id not in range(self.vocab_size - 2):
                problems.append(
                    f"visual: image_start_id {self.visual.image_start_id} and the two ids after it are not all below "
                    f"vocab_size {self.vocab_size}"
                )
        return problems
