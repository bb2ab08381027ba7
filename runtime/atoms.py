"""The finest parts of a model that are worth placing on their own, in the order in which the model declares them.

An atom is an element of a module list, a leaf module with tensors, or a bare parameter or buffer of a container. What
has to stay together is not decided here: a run of the model shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Atom:
    """A module to hook, or a bare tensor (`is_module` False), by its FQN; `module_list` is the list it belongs to."""

    name: str
    is_module: bool
    module_list: str | None = None


def find_atoms(model: nn.Module) -> tuple[Atom, ...]:
    """The atoms of `model`; every parameter and buffer lies in exactly one, a shared module in its first."""
    return tuple(_atoms("", model, seen=set()))


def tensors_of(model: nn.Module, atom: Atom) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of an atom's parameters and buffers."""
    if not atom.is_module:
        path, _, leaf = atom.name.rpartition(".")
        yield atom.name, getattr(model.get_submodule(path), leaf)
        return
    module = model.get_submodule(atom.name)
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            yield (f"{atom.name}.{name}" if atom.name else name), tensor


def _atoms(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[Atom]:
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, nn.ModuleList):
        for index, element in module.named_children():
            if element not in seen and _has_tensors(element):
                seen.update(element.modules())
                yield Atom(name=_join(name, index), is_module=True, module_list=name)
        return
    children = [(child, inner) for child, inner in module.named_children() if _has_tensors(inner)]
    own = [*module._parameters.items(), *module._buffers.items()]
    if not children:
        yield Atom(name=name, is_module=True)
        return
    for leaf, tensor in own:
        if tensor is not None:
            yield Atom(name=_join(name, leaf), is_module=False)
    for child, inner in children:
        yield from _atoms(_join(name, child), inner, seen)


def _has_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
