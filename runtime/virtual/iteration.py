"""How TensorIterator lays out the result of a pointwise operation, of which torch's meta functions tell only most.

They leave out its fast path, and break ties between dimensions of size 1 in another way. Such strides move no element,
yet they decide whether a later matrix product folds its batch or copies its operand first.
Source: fast_set_up, reorder_dimensions and allocate_or_resize_outputs in ATen/TensorIterator.cpp.
"""

from collections.abc import Sequence

import torch

Strides = tuple[int, ...]


def iterated(outcome: torch.Tensor, operands: Sequence[torch.Tensor], *, has_number: bool) -> torch.Tensor:
    """A meta tensor of `outcome`'s size and dtype, laid out as TensorIterator does for `operands`.

    `has_number`: a Python number stands beside them, which is an operand without dimensions.
    """
    same_shape = all(operand.shape == outcome.shape for operand in operands) and not (has_number and outcome.dim())
    stride = _fast_stride(outcome, operands) if same_shape else None
    if stride is None:
        stride = _ordered_stride(outcome.shape, [_broadcast_stride(operand, outcome.shape) for operand in operands])
    return torch.empty_strided(outcome.shape, stride, dtype=outcome.dtype, device="meta")


def preserved(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor laid out as empty_like lays one out: as `tensor` is, or without its gaps."""
    stride = tensor.stride() if _is_dense(tensor) else _ordered_stride(tensor.shape, [tensor.stride()])
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device="meta")


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a block of memory without gaps or overlaps, in any order."""
    step = 1
    for own, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and own != step:
            return False
        step *= size
    return True


def _fast_stride(outcome: torch.Tensor, operands: Sequence[torch.Tensor]) -> Strides | None:
    for layout in (torch.contiguous_format, torch.channels_last):
        if layout == torch.channels_last and outcome.dim() != 4:
            continue
        if all(operand.is_contiguous(memory_format=layout) for operand in operands):
            return torch.empty_like(outcome, memory_format=layout).stride()
    strides = {operand.stride() for operand in operands}
    return strides.pop() if len(strides) == 1 and _is_dense(operands[0]) else None


def _broadcast_stride(operand: torch.Tensor, shape: torch.Size) -> Strides:
    """In bytes, zero along dimensions that the operand lacks or is repeated along."""
    offset = len(shape) - operand.dim()
    own = zip(operand.shape, operand.stride(), shape[offset:], strict=True)
    steps = (0 if size == 1 != full else step * operand.element_size() for size, step, full in own)
    return (0,) * offset + tuple(steps)


def _ordered_stride(shape: torch.Size, strides: Sequence[Strides]) -> Strides:
    """Dense strides in the order of dimensions that the operands' strides ask for."""
    order = list(reversed(range(len(shape))))
    for position in range(1, len(order)):
        at = position
        for before in reversed(range(position)):
            comparison = _comparison(order[before], order[at], shape, strides)
            if comparison > 0:
                order[before], order[at] = order[at], order[before]
                at = before
            elif comparison < 0:
                break
    steps = [0] * len(shape)
    step = 1
    for dim in order:
        steps[dim] = step
        step *= shape[dim]
    return tuple(steps)


def _comparison(first: int, second: int, shape: torch.Size, strides: Sequence[Strides]) -> int:
    """Above zero when `second` moves faster than `first`, below when slower, zero when no operand tells."""
    for stride in strides:
        if stride[first] == 0 or stride[second] == 0:
            continue
        if stride[first] != stride[second]:
            return -1 if stride[first] < stride[second] else 1
        if shape[first] > shape[second]:
            return 1
    return 0
