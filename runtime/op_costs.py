"""What one operation costs: multiply-adds counted as two, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def flops_of(op: Any, args: Sequence[Any], outcome: Any) -> int:
    """FLOPs of an operation that torch has a formula for; others are bound by the bytes they move, and count zero.

    Attention is one operation here, and shapes of queries (B, H, T, E) repeat where keys and values are grouped.
    """
    packet = op.overloadpacket
    if packet is torch.ops.aten.scaled_dot_product_attention:
        query, key, value = (list(tensor.shape) for tensor in args[:3])
        key[:-2] = value[:-2] = query[:-2]
        return int(sdpa_flop_count(query[-4:], key[-4:], value[-4:])) if len(query) >= 4 else 0
    formula = flop_registry.get(packet)
    return int(formula(*args, out_val=outcome)) if formula else 0
