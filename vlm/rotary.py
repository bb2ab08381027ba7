"""Rotary positions: position ids -> cosines and sines, and queries or keys turned by them.

No buffers: both are computed once per forward, on the device of the position ids.

Shapes: B batch, T tokens, H heads, E head width.
"""

from __future__ import annotations

import torch

Rotary = tuple[torch.Tensor, torch.Tensor]


def rotary_cos_sin(
    position_ids_BT: torch.Tensor, *, head_dim: int, base: float | torch.Tensor, dtype: torch.dtype
) -> Rotary:
    """Cosine and sine of every position's angles, each (B, T, E); a base per sample is (B, 1, 1)."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids_BT.device)
    angles_BTE = (position_ids_BT[..., None].float() / base ** (steps / head_dim)).repeat(1, 1, 2)
    return angles_BTE.cos().to(dtype), angles_BTE.sin().to(dtype)


def rotate(states_BHTE: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Queries or keys turned by their position: component i is paired with component i + E/2."""
    cos_B1TE, sin_B1TE = (part.unsqueeze(1) for part in rotary)
    first, second = states_BHTE.chunk(2, dim=-1)
    return states_BHTE * cos_B1TE + torch.cat((-second, first), dim=-1) * sin_B1TE
