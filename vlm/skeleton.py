"""The model without its weights: real modules, parameters on the meta device, buffers real."""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from planner.errors import NoClassError, SourceError, UnsupportedModelError
from vlm.families import FAMILIES
from vlm.model import Model
from vlm.own_code import own_classes

HUGE_NUMEL = 2**26
"""Elements: a rotary cache of a million positions has as many."""
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_)

_REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)
"""What transformers' code raises when a config's values contradict each other or their types."""

_MAPPINGS = (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)


def build_skeleton(model: Model, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The module tree of `model` in `dtype`, ready to be filled weight by weight.

    Buffers are computed for real, because no checkpoint contains them.
    Raises: SourceError when a configuration cannot be made of the config; NoClassError for an architecture that
    neither we nor the installed transformers have a class for; UnsupportedModelError where its class refuses the
    configuration.
    """
    config_class, model_class = _classes(model)
    try:
        config = config_class.from_dict(dict(model.config))
    except _REFUSALS as problem:
        what = f"{type(problem).__name__}: {problem}"
        raise SourceError(f"the config of {model.name} is no {config_class.__name__}: {what}") from problem
    model_class = model_class or _task_class(config, model.name)
    try:
        with init_empty_weights(include_buffers=False), _LittleWork():
            skeleton = model_class._from_config(config, dtype=dtype, attn_implementation=attention)
    except (*_REFUSALS, ImportError) as problem:
        raise UnsupportedModelError(
            f"{model_class.__name__} cannot be built from the config of {model.name}: "
            f"{type(problem).__name__}: {problem}. Check its values, and that what the class needs is installed."
        ) from problem
    skeleton.tie_weights()
    _keep_in_float32(skeleton, dtype)
    return skeleton.eval()


class _LittleWork(TorchFunctionMode):
    """Lets tensors that no buffer is as large as be made without bytes: some experts' weights start as real zeros.

    Nor is any without bytes filled at random, which takes torch a millisecond each to do nothing.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS and args[0].is_meta:
            return args[0]
        if func in _FACTORIES and "device" not in kwargs:
            shape = args[0] if args and isinstance(args[0], list | tuple) else args
            if all(isinstance(length, int) for length in shape) and prod(shape) > HUGE_NUMEL:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _keep_in_float32(skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give parameters that the architecture wants in full precision that dtype, as `from_pretrained` does."""
    kept = set(skeleton._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    kept |= set(skeleton._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, parameter in skeleton.named_parameters():
        if any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.float()


def _classes(model: Model) -> tuple[type[PreTrainedConfig], type[PreTrainedModel] | None]:
    """The configuration's class, and the model's where the architecture names one; the model's own code comes last."""
    if model.architecture in FAMILIES:
        family = FAMILIES[model.architecture]
        configuration = import_module(f"{family.package}.configuration")
        modeling = import_module(f"{family.package}.modeling")
        return getattr(configuration, family.config_class), getattr(modeling, family.model_class)
    model_type = model.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        if model.code is not None:
            return own_classes(model.code, model.config)
        own = "; it brings code of its own, which --trust-remote-code runs" if "auto_map" in model.config else ""
        raise NoClassError(
            f"{model.name} has model_type {model_type!r} and architecture {model.architecture!r}: neither transformers "
            f"{transformers.__version__} nor this version has a class for it{own}"
        )
    found = getattr(transformers, model.architecture, None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return CONFIG_MAPPING[model_type], found if is_model else None


def _task_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class that generates text from such a config."""
    for mapping in _MAPPINGS:
        if type(config) in mapping:
            return mapping[type(config)]
    raise UnsupportedModelError(
        f"{name} has model_type {config.model_type!r}: transformers has no class that generates"
    )
