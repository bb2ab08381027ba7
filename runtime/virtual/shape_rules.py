"""What results of one operation look like: asked of torch's meta device once per kind of operands, then remembered.

Where torch's meta functions describe another kernel than the one that runs here, or need values that the operands
still have (a boolean mask's count), this file says so itself. It makes no device tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from runtime.virtual.adapter import Op, Signature, suggested_memory_format
from runtime.virtual.iteration import iterated, preserved
from runtime.virtual.shapes import AddressRange, Template, as_meta
from runtime.virtual.tensors import hosted
from runtime.virtual.unknowns import ShapeOnlyError

Key = tuple[Any, ...]

# Entries per operation before it starts again: a decode step of a large model adds about a hundred in all.
_MAX_REMEMBERED = 1 << 14
_REAL_INSTEAD = (
    "Without shape_only=True, virtual_gpus() runs it on real values, for which a model of smaller sizes will do"
)
# Alignment that grouped_mm asks for: TORCH_CHECK in ATen/native/GroupedMMUtils.h.
_GROUPED_ALIGNMENT_BYTES = 16


class ShapeInference:
    """Templates of an operation's results, by sizes, strides and dtypes of its operands and by its other arguments."""

    def __init__(self, op: Op, signature: Signature) -> None:
        self._op, self._signature = op, signature
        self._own = OWN_SHAPES.get(signature.name) if has_own_rules(op, signature) else None
        self._remembered: dict[Key, Any] = {}

    def __call__(self, key: Key, args: Sequence[Any], kwargs: Mapping[str, Any], addresses: AddressRange) -> Any:
        """The operation's outcome with templates for tensors.

        Raises: what torch raises for operands that do not fit each other; ShapeOnlyError where it knows no shape.
        """
        found = self._remembered.get(key)
        if found is None:
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            found = self._remembered[key] = _templates(self._outcome(args, kwargs), addresses)
        return found

    def _outcome(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        signature = self._signature
        meta_args = [_on_meta(value) for value in args]
        meta_kwargs = {name: _on_meta(value) for name, value in kwargs.items()}
        operands = [value for value in (*meta_args, *meta_kwargs.values()) if isinstance(value, torch.Tensor)]
        # A Python number in a tensor's place, as in `computing_kernel`.
        has_number = len(operands) < signature.num_tensors
        run: Any = self._op.overloadpacket if has_number else self._op
        try:
            outcome = (self._own or run)(*meta_args, **meta_kwargs)
        except NotImplementedError as error:
            raise ShapeOnlyError(
                signature.name,
                f"no shape is known for its result, from operands {_sizes(args)} without values",
                _REAL_INSTEAD,
            ) from error
        if signature.is_pointwise and signature.name != "clone" and isinstance(outcome, torch.Tensor):
            return iterated(outcome, operands, has_number=has_number or signature.overload_name == "Scalar")
        return outcome


def has_own_rules(op: Op, signature: Signature) -> bool:
    """Whether the tables of this package mean `op` by its name: no out variant, no other library's operation."""
    return op.namespace == "aten" and not any(argument.is_out for argument in signature.arguments)


def describe(values: Sequence[Any], key: list[Any], devices: list[torch.device], addresses: AddressRange) -> bool:
    """Append to `key` what decides the shape of a result, and to `devices` every operand's; whether any is shape-only.

    This runs for each operation of a model: `is_shape_only` is written out.
    """
    unknown = False
    for value in values:
        if isinstance(value, torch.Tensor):
            devices.append(value.device)
            key += (value.shape, value.stride(), value.dtype)
            try:
                unknown |= addresses.start <= value.data_ptr() < addresses.end
            except RuntimeError:
                unknown = True
        elif type(value) is list or type(value) is tuple:
            key.append(len(value))
            unknown |= describe(value, key, devices, addresses)
        else:
            # 1, 1.0 and True are equal, and promote differently.
            key += (value, value.__class__)
    return unknown


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return as_meta(value)
    if type(value) is list or type(value) is tuple:
        return [_on_meta(item) for item in value]
    return value


def _templates(outcome: Any, addresses: AddressRange) -> Any:
    if isinstance(outcome, torch.Tensor):
        return Template(outcome, addresses)
    if isinstance(outcome, list | tuple):
        return [_templates(item, addresses) for item in outcome]
    return outcome


def _sizes(values: Sequence[Any]) -> str:
    return ", ".join(str(list(value.shape)) for value in values if isinstance(value, torch.Tensor))


# Shapes that are not the meta device's


def _clone(tensor: torch.Tensor, *, memory_format: torch.memory_format | None = None) -> torch.Tensor:
    if memory_format in (None, torch.preserve_format):
        return preserved(tensor)
    return tensor.clone(memory_format=memory_format)


def _layer_norm(*args: Any) -> tuple[torch.Tensor, ...]:
    """Contiguous whatever its input is; the meta function keeps strides of dimensions of size 1."""
    normalised, *statistics = torch.ops.aten.native_layer_norm(*args)
    return torch.empty_like(normalised, memory_format=torch.contiguous_format), *statistics


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The composed operation checks the operands; a fused kernel's result is laid out as its query."""
    composed = torch.ops.aten.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    is_fused = query.dim() == 4 and query.shape[-1] == value.shape[-1] and query.stride(-1) == 1
    return preserved(query) if is_fused else composed


def _convolution(tensor: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    """Channels last when either operand is, by cudnn_conv_suggest_memory_format (torch's issue 171622)."""
    composed: torch.Tensor = torch.ops.aten.convolution(tensor, weight, *args[:7])
    formats = [suggested_memory_format(operand) for operand in (tensor, weight)]
    channels_last = [layout for layout in formats if layout != torch.contiguous_format]
    return torch.empty_like(composed, memory_format=channels_last[0] if channels_last else torch.contiguous_format)


def _grouped_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    offsets: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As create_grouped_gemm_output_tensor in ATen/native/GroupedMMUtils.h; the meta function takes bfloat16 only."""
    for operand in (left, right):
        _check_alignment(operand)
    if left.shape[-1] != right.shape[-2]:
        raise RuntimeError(f"contraction dimension of mat_a and mat_b must match: {_sizes((left, right))}")
    size = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():
        size.insert(0, left.shape[0] if left.dim() == 3 else offsets.shape[0] if offsets is not None else 1)
    dtype = out_dtype or left.dtype
    unit = _GROUPED_ALIGNMENT_BYTES // dtype.itemsize
    row = -(-size[-1] // unit) * unit
    return torch.empty_strided(size, (size[-2] * row, row, 1)[-len(size) :], dtype=dtype, device="meta")


def _check_alignment(operand: torch.Tensor) -> None:
    steps = operand.stride()[-2:]
    if any(step * operand.element_size() % _GROUPED_ALIGNMENT_BYTES for step in steps if step != 1):
        raise RuntimeError(f"strides should be multiple of {_GROUPED_ALIGNMENT_BYTES} bytes")


# Operands whose values decide the shape


def _counted_mask(mask: torch.Tensor) -> list[torch.Tensor]:
    """Integer indices as many as a boolean mask's, one per dimension."""
    count = num_true(mask)
    return list(torch.empty((count, mask.dim()), dtype=torch.int64, device="meta").unbind(1))


def num_true(mask: torch.Tensor) -> int:
    """How many elements of a mask are set; dimensions that it is expanded along are not read again and again."""
    mask, repeated = hosted(mask), 1
    for dim in range(mask.dim()):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            repeated *= mask.shape[dim]
            mask = mask.narrow(dim, 0, 1)
    return int(mask.count_nonzero()) * repeated


def _with_counted_masks(args: Sequence[Any]) -> list[Any]:
    """Arguments of `index` and `index_put_`, masks among the indices replaced."""
    tensor, indices, *others = args
    counted: list[Any] = []
    for index in indices:
        if index is None:
            counted.append(None)
        elif index.dtype in (torch.bool, torch.uint8):
            _check_mask(tensor, index, len(counted))
            counted.extend(_counted_mask(index))
        else:
            _check_bounds(tensor, index, len(counted))
            counted.append(index)
    return [tensor, counted, *others]


def _check_bounds(tensor: torch.Tensor, index: torch.Tensor, dim: int) -> None:
    """In the words of TensorAdvancedIndexing.cpp."""
    if not index.numel() or dim >= tensor.dim():
        return
    size = tensor.shape[dim]
    least, most = (int(bound) for bound in hosted(index).aminmax())
    if least < -size or most >= size:
        wrong = most if most >= size else least
        raise IndexError(f"index {wrong} is out of bounds for dimension {dim} with size {size}")


def _check_mask(tensor: torch.Tensor, mask: torch.Tensor, dim: int) -> None:
    """In the words of expandTensors in ATen/native/IndexingUtils.h."""
    for offset, size in enumerate(mask.shape):
        if tensor.shape[dim + offset] != size:
            raise IndexError(
                f"The shape of the mask {list(mask.shape)} at index {offset} does not match the shape of the indexed "
                f"tensor {list(tensor.shape)} at index {dim + offset}"
            )


def _with_enough_values(args: Sequence[Any]) -> list[Any]:
    """Arguments of `masked_scatter`, in the words of cpu_masked_scatter_kernel in IndexKernel.cpp."""
    tensor, mask, source = args
    if num_true(torch.broadcast_tensors(mask, tensor)[0]) > source.numel():
        raise RuntimeError("Number of elements of source < number of ones in mask")
    return [tensor, mask, source]


def _within(args: Sequence[Any]) -> list[Any]:
    """Arguments of `index_select`, whose indices have values: an id beyond its table is found."""
    tensor, dim, index = args
    if index.numel():
        least, most = (int(bound) for bound in hosted(index).aminmax())
        if least < 0 or most >= tensor.shape[dim]:
            raise IndexError(f"index out of range in self: {least} to {most} of {tensor.shape[dim]} rows")
    return [tensor, dim, index]


def _with_selected(args: Sequence[Any]) -> list[Any]:
    """For `masked_select(x, mask)` what is selected."""
    tensor, mask = args
    count = num_true(torch.broadcast_tensors(mask, tensor)[0])
    return [torch.empty(count, dtype=tensor.dtype, device="meta")]


def _index_put(
    tensor: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, *args: Any
) -> torch.Tensor:
    """With the check that the meta function leaves out, in the words of TensorAdvancedIndexing.cpp."""
    picked = torch.ops.aten.index(tensor, indices).shape
    own = values.shape
    offset = len(picked) - len(own)
    if offset < 0 or any(size not in (1, full) for size, full in zip(own, picked[max(offset, 0) :], strict=True)):
        raise RuntimeError(
            f"shape mismatch: value tensor of shape {list(own)} cannot be broadcast to indexing result of shape "
            f"{list(picked)}"
        )
    return tensor


OWN_SHAPES: Mapping[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "_grouped_mm": _grouped_mm,
    "convolution": _convolution,
    "_convolution": _convolution,
    "clone": _clone,
    "native_layer_norm": _layer_norm,
    "masked_select": torch.empty_like,
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_"), _index_put),
}
# Operations whose real operands decide the shape by their values, and what to infer it from instead.
BY_VALUES: Mapping[str, Callable[[Sequence[Any]], list[Any]]] = {
    "masked_select": _with_selected,
    "masked_scatter": _with_enough_values,
    "masked_scatter_": _with_enough_values,
    "index_select": _within,
    **dict.fromkeys(("index", "_unsafe_index", "index_put_", "index_put", "_index_put_impl_"), _with_counted_masks),
}
