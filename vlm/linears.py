"""The linear layers of a model whose weights can be held in fewer bits, and those that transformers leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from planner.graph import Linear


def quantisable_linears(model: nn.Module) -> Iterator[Linear]:
    """What transformers' quantisers would convert, whether or not they do by default, and the bases of LoRA layers.

    They convert `nn.Linear` itself and GPT-2's transposed kind, and neither what an architecture keeps in float32 nor
    a weight that two modules share. Low-rank parts stay as they are, wherever their base goes.
    """
    kept = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    shared = _shared_weights(model)
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, Conv1D) and not has_low_rank(module):
            continue
        is_low_rank = has_low_rank(model.get_submodule(name.rpartition(".")[0]))
        if not is_low_rank and id(module.weight) not in shared and should_convert_module(name, kept):
            yield _linear(name, module)


def has_low_rank(module: nn.Module) -> bool:
    """Whether a module is a linear layer with low-rank parts inside it, as LoRA layers of ours are."""
    return isinstance(module, nn.Linear) and next(module.children(), None) is not None


def _linear(name: str, module: nn.Module) -> Linear:
    rows, cols = module.weight.shape
    return Linear(name, rows, cols) if isinstance(module, nn.Linear) else Linear(name, cols, rows)


def _shared_weights(model: nn.Module) -> frozenset[int]:
    """Identities of parameters that have several names, or that transformers ties."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    counts = Counter(map(id, parameters.values()))
    ties = model.all_tied_weights_keys if isinstance(model, PreTrainedModel) else {}
    tied = {id(parameters[name]) for name in (*ties, *ties.values()) if name in parameters}
    return frozenset(tied | {key for key, count in counts.items() if count > 1})
