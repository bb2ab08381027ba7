"""Weights in fewer bits, through transformers' quantisers: the same modules, converted while they are loaded.

A quantiser swaps a skeleton's linear layers for its own before weights arrive, and turns weights into codes as they do.
What it does not know are LoRA layers of ours, whose base it sees as a plain layer for that moment.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig, HfQuantizer

from planner.errors import PlanMismatchError, SourceError, UnsupportedModelError
from planner.paths import contains, owner
from planner.plan import Plan
from planner.quantisation import Layout
from runtime.virtual.process import PROCESS
from vlm.linears import has_low_rank, quantisable_linears

EXTRA = "pip install 'plan-devices[quantized]'"
NOT_RUN = ("gptq", "awq", "fp8", "fbgemm_fp8")
"""Methods that are planned from their files' headers and loaded by transformers, untried here: they need a GPU."""


def quantiser_for(
    skeleton: PreTrainedModel, plan: Plan, stored: Mapping[str, Any] | None, device_map: Mapping[str, torch.device]
) -> HfQuantizer | None:
    """What holds the plan's weights in fewer bits; None for a plan without such. `stored` is the checkpoint's config.

    What the map has on the meta device, because another process holds it, is left as it is.

    Raises: PlanMismatchError where plan and checkpoint differ; UnsupportedModelError when the method's library is not
    there or does not run here, or a quantised layer is to rest on the host.
    """
    if plan.quantization is None or plan.quantization.stored != (stored is not None):
        if plan.quantization is None and stored is None:
            return None
        raise PlanMismatchError(
            f"the plan is for {'quantised' if stored is None else 'plain'} weights, and the checkpoint's are "
            f"{'plain' if stored is None else 'quantised'}: plan this checkpoint"
        )
    places = {device for device in device_map.values() if device.type != "meta"}
    if torch.device("cpu") in places and len(places) > 1:
        raise UnsupportedModelError("quantised layers do not rest on the host: place all modules on GPUs")
    config = _config_for(skeleton, plan, device_map) if stored is None else _stored_config(stored)
    try:
        quantiser = AutoHfQuantizer.from_config(config, pre_quantized=stored is not None)
        quantiser.validate_environment(device_map=dict(device_map))
    except (ImportError, RuntimeError, ValueError, OSError) as problem:
        method = getattr(config.quant_method, "value", config.quant_method)
        tried = " This method has been planned, and never run here." if method in NOT_RUN else ""
        raise UnsupportedModelError(
            f"{', '.join(plan.quantization.layouts)} cannot be loaded here: {problem}.{tried} The libraries that this "
            f"version knows come with {EXTRA}"
        ) from problem
    if any(map(is_virtual, places)):
        PROCESS.caches["quantisers"] = forget_code_books
    return quantiser


def forget_code_books() -> None:
    """Let go of the code books and ranges that the libraries keep for every device; they make them anew."""
    for name, library in list(sys.modules.items()):
        if name.partition(".")[0] in ("bitsandbytes", "compressed_tensors"):
            for value in vars(library).values():
                if isinstance(value, dict) and value and all(map(_is_tensors, value.values())):
                    value.clear()
                elif hasattr(type(value), "cache_clear"):  # of the instance, a stand-in for a missing library has any
                    value.cache_clear()


def _is_tensors(value: Any) -> bool:
    return all(isinstance(one, torch.Tensor) for one in (value if isinstance(value, tuple) else (value,)))


def swap_layers(skeleton: PreTrainedModel, quantiser: HfQuantizer, device_map: Mapping[str, torch.device]) -> None:
    """Make the layers of `skeleton` that are quantised those of `quantiser`, still without weights."""
    layered = {name: module for name, module in skeleton.named_modules() if has_low_rank(module)}
    for name, module in layered.items():
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        skeleton.set_submodule(name, plain.to(module.weight.dtype))
    with local_torch_dtype(skeleton.dtype, type(skeleton).__name__):  # of biases of the layers that it makes
        quantiser.preprocess_model(model=skeleton, dtype=skeleton.dtype, device_map=dict(device_map))
    for name, module in layered.items():
        skeleton.set_submodule(name, _with_low_rank(skeleton.get_submodule(name), module))
    skeleton.eval()
    _leave_odd_shapes_unpacked(skeleton)


def _leave_odd_shapes_unpacked(skeleton: PreTrainedModel) -> None:
    """Let layers whose shape bitsandbytes' packing for CPUs with AVX512 cannot take run there without it.

    Source: bitsandbytes 0.50, functional._convert_weight_packed_for_cpu, which fails for them.
    """
    for module in skeleton.modules():
        odd = hasattr(module, "support_avx512bf16_for_cpu") and (module.in_features % 64 or module.out_features % 32)
        if odd:
            module.support_avx512bf16_for_cpu = False


def finish_layers(skeleton: PreTrainedModel, quantiser: HfQuantizer) -> None:
    """What remains once the weights are there.

    compressed-tensors would unpack in the first forward and place the model anew for it: it unpacks now, in place.
    """
    skeleton.hf_quantizer = quantiser
    quantiser.postprocess_model(skeleton)
    for module in skeleton.modules():
        weight = module._parameters.get("weight")
        if weight is not None and is_virtual(weight.device) and type(weight) is not nn.Parameter:
            module.forward = eager()(module.forward)
    compressor = getattr(quantiser, "compressor", None)
    if compressor is not None:
        compressor.decompress_model(skeleton)
        skeleton._forward_pre_hooks.clear()


def let_weights_go(skeleton: nn.Module) -> None:
    """Leave a model with tensors of the same names and shapes, and no memory."""
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter.data, device="meta"), False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
        vars(module).pop("quant_state", None)


def is_virtual(device: torch.device) -> bool:
    """Whether a device is a virtual GPU."""
    return device.type == "vgpu"


def eager() -> Any:
    """A context, or a decorator, in which nothing is compiled: for virtual GPUs bitsandbytes would, for every shape."""
    return torch.compiler.set_stance("force_eager")


def held_tensors(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """A parameter and the scales and code books that it carries beside its codes."""
    yield parameter
    scales = getattr(parameter, "SCB", None)
    if scales is not None:
        yield scales
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        parts = (getattr(state, name, None) for name in ("absmax", "code", "offset"))
        yield from (part for part in parts if part is not None)
        state = getattr(state, "state2", None)


def quantised_copy(
    skeleton: PreTrainedModel, layouts: Mapping[str, Layout], stored: Mapping[str, Any] | None
) -> tuple[PreTrainedModel, HfQuantizer]:
    """A copy of a skeleton with the linear layers of `layouts` swapped, as transformers sizes it, and its quantiser.

    Raises: UnsupportedModelError when the method's library is not there.
    """
    twin = copy.deepcopy(skeleton)
    others = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear) and name not in layouts]
    layout = next(iter(layouts.values())).name
    dtype = str(skeleton.dtype).removeprefix("torch.")
    config = _stored_config(stored) if stored else _bitsandbytes_config(layout, dtype, _exactly(others))
    try:
        quantiser = AutoHfQuantizer.from_config(config, pre_quantized=stored is not None)
        swap_layers(twin, quantiser, {})
    except (ImportError, NameError, RuntimeError, ValueError) as problem:
        raise UnsupportedModelError(f"transformers cannot size {layout} layers here: {problem}. {EXTRA}") from problem
    return twin, quantiser


def _config_for(skeleton: PreTrainedModel, plan: Plan, device_map: Mapping[str, torch.device]) -> BitsAndBytesConfig:
    """What quantises the layers that the plan counts, and no others, where this process holds them.

    Raises: PlanMismatchError when they are not as many as the plan says.
    """
    part = plan.quantization
    assert part is not None
    known = {linear.name for linear in quantisable_linears(skeleton)}
    chosen = {name for name in known if not any(contains(module, name) for module in part.kept)}
    if len(chosen) != part.num_layers:
        raise PlanMismatchError(
            f"the plan quantises {part.num_layers} layers, and here {len(chosen)} are outside of what it keeps "
            f"({', '.join(part.kept) or 'nothing'}). Make the plan anew."
        )
    elsewhere = {name for name in known if device_map[owner(name, device_map) or ""].type == "meta"}
    linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    others = [name for name in linears if name not in known or name in elsewhere]
    return _bitsandbytes_config(part.layouts[0], plan.workload.dtype, [*part.skip_modules, *_exactly(others)])


def _exactly(names: Iterable[str]) -> list[str]:
    """Expressions that match these modules and no others."""
    return [f"^{re.escape(name)}$" for name in names]


def _bitsandbytes_config(layout: str, dtype: str, skipped: list[str]) -> BitsAndBytesConfig:
    if layout == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=layout.removesuffix("-double"),
        bnb_4bit_use_double_quant=layout.endswith("-double"),
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def _stored_config(content: Mapping[str, Any]) -> Any:
    try:
        return AutoQuantizationConfig.from_dict(dict(content))
    except (ValueError, TypeError, KeyError, ImportError) as problem:
        raise SourceError(f"the checkpoint's quantization_config cannot be used: {problem}") from problem


def _with_low_rank(base: nn.Module, layer: nn.Module) -> nn.Module:
    """`layer` with `base` in place of what it had as a plain linear layer: low-rank parts, attributes and forward.

    Its class is then a subclass of both, whose plain product is the base's.
    """
    if type(base) is nn.Linear:
        layer._parameters.update(base._parameters)
        return layer
    own = {name: value for name, value in vars(layer).items() if name not in vars(base)}
    vars(base).update(own)
    base._modules.update(layer._modules)
    base.__class__ = type(f"Quantised{type(layer).__name__}", (type(layer), type(base)), {})
    return base
