"""Where an operation runs whose operands lie on several devices, or CUDA's complaint about them.

It turns tensors into what `rules.py` judges, and lets an observer note a mismatch instead of having it raised.
"""

from collections.abc import Mapping
from typing import Any

import torch

from runtime.virtual.adapter import DEVICE_TYPE, Signature
from runtime.virtual.process import PROCESS
from runtime.virtual.rules import DeviceMismatchError, Operand, Rule, complaint, rule_for, running_device


def agreed_device(signature: Signature, rule: Rule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Where an operation whose operands lie on several devices runs.

    Raises: DeviceMismatchError when CUDA would refuse them.
    """
    operands = _operands(signature, args, kwargs)
    message = complaint(rule, operands, wrapper_name(signature))
    if message is not None:
        problem = DeviceMismatchError(message, op_name=signature.name, operands=tuple(operands))
        if PROCESS.observer is None:
            raise problem
        PROCESS.observer.mismatched(problem, _tensors(args, kwargs))
    return torch.device(running_device(rule, operands))


def rule_of(signature: Signature) -> Rule:
    """CUDA's rule for the operation."""
    return rule_for(signature.name, signature.overload_name, is_pointwise=signature.is_pointwise)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    values = [*args, *kwargs.values()]
    nested = [item for value in values for item in (value if isinstance(value, list | tuple) else (value,))]
    return [value for value in nested if isinstance(value, torch.Tensor)]


def _operands(signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Operand]:
    operands = []
    for position, argument in enumerate(signature.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                shape = tuple(tensor.shape)
                operand = Operand(
                    argument=argument.name, device=str(tensor.device), shape=shape, is_written=argument.is_written
                )
                operands.append(operand)
    return operands


def wrapper_name(signature: Signature) -> str:
    """The function that CUDA's message would name, with our device type: `wrapper_vgpu_cat`.

    Source: torchgen/dest/register_dispatch_key.py; a structured kernel is named by the operation and then its
    overload, any other by its overload first, which is empty for most.
    """
    if not signature.is_structured:
        return f"wrapper_{DEVICE_TYPE}_{signature.overload_name}_{signature.name}"
    overload_name = f"_{signature.overload_name}" if signature.overload_name else ""
    return f"wrapper_{DEVICE_TYPE}_{signature.name}{overload_name}"
