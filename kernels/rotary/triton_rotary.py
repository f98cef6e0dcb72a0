"""Rotary positions on a GPU, in one pass over memory. Takes the place of portable.Rotary, argument for argument.

Legend: B batch, T tokens, H heads, K head dimension, R rows of a block (a row is one head of one token), P pairs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_support import interpreting, power_of_two, rows_contiguous


@triton.jit
def rotate_kernel(
    x, cos, sin, y, length, heads, pairs, x_strides, angle_stride, sign,
    ADJACENT: tl.constexpr, R_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate by sign times the angle."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * R_BLOCK + tl.arange(0, R_BLOCK)
    p = tl.arange(0, P_BLOCK)
    token, head = row // heads, row % heads
    mask = (token < length)[:, None] & (p < pairs)[None, :]
    if ADJACENT:
        first, second = 2 * p, 2 * p + 1
    else:
        first, second = p, p + pairs
    angle = (b * angle_stride + token * pairs)[:, None] + p[None, :]
    cos_RP = tl.load(cos + angle, mask=mask, other=0.0)
    sin_RP = tl.load(sin + angle, mask=mask, other=0.0) * sign
    source = (b * x_strides[0] + token * x_strides[1] + head * x_strides[2])[:, None]
    a_RP = tl.load(x + source + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b_RP = tl.load(x + source + second[None, :], mask=mask, other=0.0).to(tl.float32)
    target = ((b * length * heads + row) * (2 * pairs))[:, None]
    tl.store(y + target + first[None, :], (a_RP * cos_RP - b_RP * sin_RP).to(y.dtype.element_ty), mask=mask)
    tl.store(y + target + second[None, :], (a_RP * sin_RP + b_RP * cos_RP).to(y.dtype.element_ty), mask=mask)


def _rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor, adjacent: bool, sign: float) -> Tensor:
    x_BTHK = rows_contiguous(x_BTHK)
    batch, length, heads, head_dim = x_BTHK.shape
    pairs = head_dim // 2
    block = power_of_two(pairs)
    rows = 4 if interpreting() else max(1, 2048 // block)
    y_BTHK = torch.empty(x_BTHK.shape, dtype=x_BTHK.dtype, device=x_BTHK.device)
    triton_support.launch(
        rotate_kernel, (-(-length * heads // rows), batch), x_BTHK, cos, sin, y_BTHK, length, heads, pairs,
        x_BTHK.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0, sign,
        ADJACENT=adjacent, R_BLOCK=rows, P_BLOCK=block, num_warps=4,
    )  # fmt: skip
    return y_BTHK


class TritonRotary(torch.autograd.Function):
    """See `rotary`; cos and sin are float32."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor, pairs_adjacent: bool) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.pairs_adjacent = pairs_adjacent
        return _rotate(x_BTHK, cos, sin, pairs_adjacent, 1.0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, ctx.pairs_adjacent, -1.0), None, None, None
