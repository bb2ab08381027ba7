"""Official config.json of GLM-4-9B or GLM-4V-9B <-> a checked transformers configuration."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from vlm.configuration import is_number, not_equal, not_multiple, not_positive, refuse

ROTARY_BASE = 10_000.0

SAME_FOR_ALL = {
    "multi_query_attention": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
}
"""Switches of the official code that no GLM-4-9B model sets otherwise, and that are not built here otherwise."""


OFFICIAL_NAMES = {
    "num_layers": "num_hidden_layers",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}
"""What the official config.json calls otherwise than transformers does; either name reads and sets the value."""


class ChatGLMVisionConfig(PreTrainedConfig):
    """Sizes of the EVA2-CLIP vision encoder; the defaults are GLM-4V-9B's."""

    model_type = "chatglm_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_heads: int = 16
    in_channels: int = 3
    image_size: int = 1120
    patch_size: int = 14
    num_positions: int = 6401
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    scaling_factor: float = 8

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def problems(self) -> list[str]:
        """What is malformed or contradictory, each with its key."""
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_heads", "in_channels", "num_positions")
        malformed = not_positive(vars(self), (*sizes, "image_size", "patch_size"))
        if not is_number(self.scaling_factor, at_least=0) or not self.scaling_factor:
            malformed.append(f"scaling_factor is {self.scaling_factor!r}; it must be a number above 0")
        if malformed:
            return malformed
        problems = not_multiple(vars(self), "hidden_size", "num_heads")
        merged = {"image_size": self.image_size, "two patches": 2 * self.patch_size}
        problems += not_multiple(merged, "image_size", "two patches")
        expected = (self.image_size // self.patch_size) ** 2 + 1
        if self.num_positions != expected:
            problems.append(
                f"num_positions is {self.num_positions}; the patches of image_size and a class are {expected}"
            )
        return problems


class ChatGLMConfig(PreTrainedConfig):
    """Sizes and constants of a GLM-4-9B model; the defaults are GLM-4V-9B's, but that it has no images by itself.

    Without `vision_config` it is a text model.
    Raises: ValueError naming every key whose value contradicts another or a rule.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs: ClassVar = {"vision_config": ChatGLMVisionConfig}
    attribute_map: ClassVar = {**OFFICIAL_NAMES, "image_token_id": "boi_token_id"}

    num_hidden_layers: int = 40
    hidden_size: int = 4096
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    intermediate_size: int = 13696
    vocab_size: int = 151552
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1.5625e-07
    add_qkv_bias: bool = True
    rope_ratio: float = 1
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 151329
    eos_token_id: int | list[int] | None = None
    boi_token_id: int = 151339
    eoi_token_id: int = 151340
    vision_config: Any = None  # a mapping in a file, a ChatGLMVisionConfig here

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = ChatGLMVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)
        refuse(type(self).__name__, self._malformed() or self._contradictions())

    def to_dict(self) -> dict[str, Any]:
        """The configuration under its official keys; a text model has no `vision_config`."""
        values = super().to_dict()
        if self.vision_config is None:
            values.pop("vision_config", None)
        return values | {official: values.pop(own) for official, own in OFFICIAL_NAMES.items() if own in values}

    @property
    def image_tokens(self) -> int:
        """Positions of an image in the sequence: a square of four patches each, and a beginning and an end."""
        vision = self.vision_config
        return 0 if vision is None else (vision.image_size // vision.patch_size // 2) ** 2 + 2

    @property
    def rotary_width(self) -> int:
        """Components of a head that are turned by position: half of them."""
        return self.head_dim // 2

    @property
    def rotary_base(self) -> float:
        return ROTARY_BASE * self.rope_ratio

    def _malformed(self) -> list[str]:
        heads = ("num_attention_heads", "multi_query_group_num", "kv_channels")
        sizes = ("num_layers", "hidden_size", *heads, "ffn_hidden_size", "padded_vocab_size", "seq_length")
        problems = not_positive({key: getattr(self, key) for key in sizes}, sizes)
        if not is_number(self.rope_ratio, at_least=0) or not self.rope_ratio:
            problems.append(f"rope_ratio is {self.rope_ratio!r}; it must be a number above 0")
        return problems

    def _contradictions(self) -> list[str]:
        problems = not_equal(vars(self), SAME_FOR_ALL)
        heads = {"num_attention_heads": self.num_attention_heads, "multi_query_group_num": self.num_key_value_heads}
        problems += not_multiple(heads, "num_attention_heads", "multi_query_group_num")
        if self.head_dim % 4:
            problems.append(f"kv_channels is {self.head_dim}; half of them are turned in pairs, so 4 must divide it")
        if self.vision_config is not None:
            problems += [f"vision_config: {problem}" for problem in self.vision_config.problems()]
            for key in ("boi_token_id", "eoi_token_id"):
                if getattr(self, key) not in range(self.vocab_size):
                    problems.append(f"{key} {getattr(self, key)} is outside of padded_vocab_size {self.vocab_size}")
        return problems
