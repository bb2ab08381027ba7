"""Official config.json of the first InternLM-XComposer <-> a checked transformers configuration."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import Blip2QFormerConfig, Blip2VisionConfig

from vlm.configuration import is_number, not_equal, not_multiple, not_positive
from vlm.internlm.configuration import InternLMConfig

LORA_TARGETS = {
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "ffn": ("mlp.up_proj", "mlp.down_proj"),
}
"""The linear layers of a decoder layer that each name in `learn_param` stands for."""


class InternLMXComposerConfig(InternLMConfig):
    """Sizes and constants of a first InternLM-XComposer; language model defaults are the released models'.

    `vision_config`, `qformer_config` and `image_token_id` are not in an official config.json: their defaults are what
    the official code hard-codes (EVA-CLIP's ViT-g; a Q-Former of twelve layers, every second one looking at the image),
    and the id of `<TOKENS_UNUSED_2>`, which stands at every image position. Both may name some of their keys only.
    Raises: ValueError naming every key whose value contradicts another or a rule.
    """

    model_type = "InternLMXComposer"
    sub_configs: ClassVar = {"vision_config": Blip2VisionConfig, "qformer_config": Blip2QFormerConfig}

    rms_norm_eps: float = 1e-5
    kqvo_bias: bool = True
    intern_converted_llm: bool = True
    num_query_token: int = 64
    internlm_lora: dict[str, Any] | None = None
    image_token_id: int = 103029
    vision_config: Any = None  # a mapping in a file, a Blip2VisionConfig here
    qformer_config: Any = None  # a mapping in a file, a Blip2QFormerConfig here

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, Blip2VisionConfig):
            self.vision_config = Blip2VisionConfig(**(self.vision_config or {}))
        if not isinstance(self.qformer_config, Blip2QFormerConfig):
            self.qformer_config = Blip2QFormerConfig(**(self.qformer_config or {}))
        self.bias = self.kqvo_bias
        super().__post_init__(**kwargs)

    @property
    def image_tokens(self) -> int:
        """Positions of an image in the sequence: the queries, and a learned beginning and end."""
        return self.num_query_token + 2

    def _malformed(self) -> list[str]:
        problems = super()._malformed() + not_positive(vars(self), ("num_query_token",))
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key, extra in (("vision_config", ("image_size", "patch_size")), ("qformer_config", ())):
            nested = not_positive(vars(getattr(self, key)), (*sizes, *extra))
            problems += [f"{key}: {problem}" for problem in nested]
        return problems + self._lora_problems()

    def _lora_problems(self) -> list[str]:
        if self.internlm_lora is None:
            return []
        problems = not_positive({"lora_r": None, **self.internlm_lora}, ("lora_r",))
        if not is_number(self.internlm_lora.get("lora_alpha"), at_least=0):
            problems.append(f"lora_alpha is {self.internlm_lora.get('lora_alpha')!r}; it must be a number")
        unknown = [name for name in self.internlm_lora.get("learn_param", []) if name not in LORA_TARGETS]
        if unknown:
            problems.append(f"learn_param has {', '.join(map(str, unknown))}; known are {', '.join(LORA_TARGETS)}")
        return [f"internlm_lora: {problem}" for problem in problems]

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions() + not_equal(vars(self), {"intern_converted_llm": True})
        vision, qformer = self.vision_config, self.qformer_config
        for key, nested in (("vision_config", vision), ("qformer_config", qformer)):
            problems += [f"{key}: {p}" for p in not_multiple(vars(nested), "hidden_size", "num_attention_heads")]
        problems += [f"vision_config: {p}" for p in not_multiple(vars(vision), "image_size", "patch_size")]
        if qformer.encoder_hidden_size != vision.hidden_size:
            problems.append(
                f"qformer_config: encoder_hidden_size {qformer.encoder_hidden_size} is not the vision encoder's "
                f"hidden_size {vision.hidden_size}"
            )
        if self.image_token_id not in range(self.vocab_size):
            problems.append(f"image_token_id {self.image_token_id} is outside of vocab_size {self.vocab_size}")
        return problems
