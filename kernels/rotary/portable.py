"""Rotary positions: a rotation, so the backward rotates back and needs nothing but the angles.

Angles are taken in float64: at a position of a million a float32 product is wrong by a few hundredths of a radian.

Legend: B batch, T tokens, H heads, K head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order


def angles(positions: Tensor, pairs: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin in float64 of shape (B or 1, T, 1, pairs), for positions (T,) or (B, T)."""
    exponent = torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs
    angle = positions.to(torch.float64)[..., None, None] * torch.pow(base, -exponent)
    angle = angle if angle.dim() == 4 else angle.unsqueeze(0)
    return angle.cos(), angle.sin()


def _rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, pairs_adjacent: bool) -> Tensor:
    out = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    pairs = x_BTHK.shape[-1] // 2
    cut = (slice(0, None, 2), slice(1, None, 2)) if pairs_adjacent else (slice(0, pairs), slice(pairs, None))
    first, second = x_BTHK[..., cut[0]].to(cos.dtype), x_BTHK[..., cut[1]].to(cos.dtype)
    out[..., cut[0]] = (first * cos).addcmul_(second, sin, value=-1.0)
    out[..., cut[1]] = (first * sin).addcmul_(second, cos)
    return out


class Rotary(torch.autograd.Function):
    """See `rotary`; cos and sin have the dtype of the computation."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor, pairs_adjacent: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.pairs_adjacent = pairs_adjacent
        return _rotate(x_BTHK, cos, sin, pairs_adjacent)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTHK,) = grads
        cos, sin = ctx.saved_tensors
        return _rotate(grad_BTHK, cos, -sin, ctx.pairs_adjacent), None, None, None
