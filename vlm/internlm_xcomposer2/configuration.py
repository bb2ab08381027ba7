"""Official config.json of InternLM2 or InternLM-XComposer2 <-> a checked transformers configuration.

Both families call themselves `internlm2`; the class says which one is meant. It knows nothing of modules or weights.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig

from vlm.configuration import is_number, not_multiple, not_positive, refuse
from vlm.internlm_xcomposer2.facts import CLIP_LARGE

DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 1.0}
CLIP_LARGE_NUMERICS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
POSITIVE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


class InternLM2Config(PreTrainedConfig):
    """Sizes and constants of an InternLM2 language model; the defaults are the 7B model's.

    `rope_theta` and `rope_scaling` are read in their official form and in transformers' `rope_parameters`, and written
    in the official one. A missing `rope_scaling` is the official dynamic one; `null` is none.
    Raises: ValueError naming every key whose value contradicts another or a rule.
    """

    model_type = "internlm2"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 1_000_000.0

    vocab_size: int = 92544
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8  # null in a file means one per attention head
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    # Declared, or transformers takes it for a generation parameter that got here by mistake, and refuses to save it.
    max_length: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 2
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    rope_parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if kwargs.get("rope_scaling") is not None:
            # transformers completes the dictionary in place, and this one is the caller's
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])
        elif self.rope_parameters:
            self.rope_parameters = dict(self.rope_parameters)
        elif "rope_scaling" not in kwargs:
            self.rope_parameters = dict(DYNAMIC_ROPE)
        super().__post_init__(**kwargs)
        self.rope_parameters.pop("type", None)  # the old spelling of rope_type, which is set by now
        # contradictions divide by what malformed checks
        refuse(type(self).__name__, self._malformed() or self._contradictions())

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """The configuration under its official keys."""
        values = super().to_dict()
        rope = values.pop("rope_parameters")
        scaled = rope["rope_type"] != "default"
        values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]} if scaled else None
        return values

    def _malformed(self) -> list[str]:
        return not_positive(vars(self), POSITIVE_KEYS)

    def _contradictions(self) -> list[str]:
        problems = not_multiple(vars(self), "hidden_size", "num_attention_heads")
        problems += not_multiple(vars(self), "num_attention_heads", "num_key_value_heads")
        if self.head_dim % 2:
            problems.append(f"hidden_size / num_attention_heads is {self.head_dim}; rotary positions need it even")
        return problems + self._rope_problems()

    def _rope_problems(self) -> list[str]:
        rope = self.rope_parameters
        problems = []
        if rope.get("rope_type") not in ("default", "dynamic"):
            problems.append(f"rope_scaling type is {rope.get('rope_type')!r}; InternLM2 has 'dynamic' or none")
        elif rope["rope_type"] == "dynamic" and not is_number(rope.get("factor"), at_least=1):
            problems.append(f"rope_scaling factor is {rope.get('factor')!r}; it must be a number of at least 1")
        if not is_number(rope.get("rope_theta"), at_least=1):
            problems.append(f"rope_theta is {rope.get('rope_theta')!r}; it must be a number of at least 1")
        return problems


class InternLMXComposer2Config(InternLM2Config):
    """Sizes and constants of an InternLM-XComposer2 model; the defaults are VL-7B's.

    `plora_rank`, `plora_alpha`, `vision_config` and `image_token_id` are not in an official config.json: their defaults
    are what the official code hard-codes, and the id of `[UNUSED_TOKEN_0]`, which stands at every image position.
    `vision_config` may name some of its keys only.
    """

    img_size: int = 490
    plora_rank: int = 256
    plora_alpha: int = 256
    image_token_id: int = 92397
    vision_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = {**CLIP_LARGE, **CLIP_LARGE_NUMERICS, **(self.vision_config or {})}
        super().__post_init__(**kwargs)

    @property
    def image_tokens(self) -> int:
        """Positions that one image takes in the sequence."""
        return (self.img_size // self.vision_config["patch_size"]) ** 2

    def clip_config(self) -> CLIPVisionConfig:
        """The vision tower's own configuration, at this model's image size."""
        return CLIPVisionConfig(**{**self.vision_config, "image_size": self.img_size})

    def _malformed(self) -> list[str]:
        own = not_positive(vars(self), ("img_size", "plora_rank", "plora_alpha"))
        nested = not_positive(self.vision_config, CLIP_LARGE)
        return super()._malformed() + own + [f"vision_config: {problem}" for problem in nested]

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        vision = self.vision_config
        problems += not_multiple({**vision, "img_size": self.img_size}, "img_size", "patch_size")
        problems += [f"vision_config: {p}" for p in not_multiple(vision, "hidden_size", "num_attention_heads")]
        if vision.get("image_size", self.img_size) != self.img_size:
            problems.append(f"vision_config: image_size {vision['image_size']} is not img_size {self.img_size}")
        if self.image_token_id not in range(self.vocab_size):
            problems.append(f"image_token_id {self.image_token_id} is outside of vocab_size {self.vocab_size}")
        return problems
