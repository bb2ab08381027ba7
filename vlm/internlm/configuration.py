"""Official config.json of InternLM-7B or -20B <-> a checked transformers configuration, of Llama's kind."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from vlm.configuration import is_number, not_multiple, not_positive, refuse

ROTARY_BASE = 10_000


class InternLMConfig(LlamaConfig):
    """Sizes and constants of an InternLM language model; the defaults are the 7B model's.

    `bias` is that of the four projections of attention; the feed-forward has none. `rotary` is the official form of
    what transformers keeps as `rope_parameters`: its type is "origin", or "dynamic" with a factor of 1.
    Raises: ValueError naming every key whose value contradicts another or a rule.
    """

    model_type = "internlm"

    vocab_size: int = 103168
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 2
    bias: bool = True
    rotary: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pad_token_id == -1:
            self.pad_token_id = None  # how the official configs say that there is none
        problems = self._malformed()
        refuse(type(self).__name__, problems or self._contradictions())
        self.attention_bias, self.mlp_bias = self.bias, False
        self.rope_parameters = {"rope_type": "default", "rope_theta": float(self._rotary("base", ROTARY_BASE))}
        if self._rotary("type", "origin") == "dynamic":
            self.rope_parameters |= {"rope_type": "dynamic", "factor": 1.0}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration under its official keys."""
        derived = ("rope_parameters", "attention_bias", "mlp_bias")
        return {key: value for key, value in super().to_dict().items() if key not in derived}

    def _rotary(self, key: str, default: Any) -> Any:
        return (self.rotary or {}).get(key, default)

    def _malformed(self) -> list[str]:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        problems = not_positive(vars(self), (*sizes, "max_position_embeddings"))
        if not is_number(self._rotary("base", ROTARY_BASE), at_least=1):
            problems.append(f"rotary base is {self._rotary('base', None)!r}; it must be a number of at least 1")
        if self._rotary("type", "origin") not in ("origin", "dynamic"):
            problems.append(f"rotary type is {self._rotary('type', None)!r}; InternLM has 'origin' or 'dynamic'")
        return problems

    def _contradictions(self) -> list[str]:
        return not_multiple(vars(self), "hidden_size", "num_attention_heads")
