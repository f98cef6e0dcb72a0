"""Short causal convolution on a GPU. Takes the place of portable.ShortConvolution, argument for argument.

A program owns a block of tokens and channels: it moves memory and hardly computes, so every token is read once from
memory and the W - 1 times after that from the cache. The backward counts tokens from the beginning of the halo, so that
one kernel gives the gradients of halo and x, side by side; those of taps and bias are one partial sum per block.

Legend: B batch, T tokens, D channels, W taps; inside kernels T and D are those of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..documents import document_age
from ..triton_math import sigmoid
from ..triton_support import batch_strides, interpreting, power_of_two, rows_contiguous


@triton.jit
def _source(x, halo, x_stride, t_T, length, d, mask_D, channels, WIDTH: tl.constexpr):
    """Tokens t_T (64-bit, may be negative: then of the halo) as float32; zeros at and behind the end."""
    inside_TD = ((t_T >= 0) & (t_T < length))[:, None] & mask_D[None, :]
    x_TD = tl.load(x + t_T[:, None] * x_stride + d[None, :], mask=inside_TD, other=0.0).to(tl.float32)
    before_TD = ((t_T < 0) & (t_T > -WIDTH))[:, None] & mask_D[None, :]
    halo_TD = tl.load(halo + (WIDTH - 1 + t_T)[:, None] * channels + d[None, :], mask=before_TD, other=0.0)
    return x_TD + halo_TD.to(tl.float32)


@triton.jit
def convolve_kernel(
    x, weight, bias, halo, age, y, length, channels, x_strides, age_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, T_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """y of a block; `weight` is (W, D) in the order of lags."""
    d = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    t_T = tl.program_id(0).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK)
    b = tl.program_id(2).to(tl.int64)
    mask_D = d < channels
    x += b * x_strides[0]
    halo += b * (WIDTH - 1) * channels
    sum_TD = tl.zeros([T_BLOCK, D_BLOCK], dtype=tl.float32)
    if bias is not None:
        sum_TD += tl.load(bias + d, mask=mask_D, other=0.0)[None, :]
    if age is not None:
        age_T = tl.load(age + b * age_stride + t_T, mask=t_T < length, other=0)
    for j in tl.static_range(WIDTH):
        x_TD = _source(x, halo, x_strides[1], t_T - j, length, d, mask_D, channels, WIDTH)
        if age is not None:
            x_TD = tl.where((age_T >= j)[:, None], x_TD, 0.0)
        sum_TD += x_TD * tl.load(weight + j * channels + d, mask=mask_D, other=0.0)[None, :]
    if SILU:
        sum_TD *= sigmoid(sum_TD)
    mask_TD = (t_T < length)[:, None] & mask_D[None, :]
    tl.store(y + (b * length + t_T)[:, None] * channels + d[None, :], sum_TD.to(y.dtype.element_ty), mask=mask_TD)


@triton.jit
def gradient_kernel(
    x, weight, bias, halo, age, grad_y, grad_extended, grad_taps, length, channels, x_strides, grad_strides, age_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, T_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens t_T, halo included, and this block's share of those of taps (W rows) and bias (one)."""
    d = tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    t_T = tl.program_id(0).to(tl.int64) * T_BLOCK + tl.arange(0, T_BLOCK) - (WIDTH - 1)
    b = tl.program_id(2).to(tl.int64)
    mask_D = d < channels
    x += b * x_strides[0]
    halo += b * (WIDTH - 1) * channels
    grad_y += b * grad_strides[0]
    grad_taps += (b * tl.num_programs(0) + tl.program_id(0)) * (WIDTH + 1) * channels
    grad_x_TD = tl.zeros([T_BLOCK, D_BLOCK], dtype=tl.float32)
    here_TD = _source(x, halo, x_strides[1], t_T, length, d, mask_D, channels, WIDTH)
    if SILU:  # the sums before the activation, of the tokens that read these: they need what lies between as well
        others = ()
        for i in tl.static_range(2 * WIDTH - 1):
            if i == WIDTH - 1:
                others = others + (here_TD,)  # noqa: RUF005
            else:
                near_TD = _source(x, halo, x_strides[1], t_T + (i - WIDTH + 1), length, d, mask_D, channels, WIDTH)
                others = others + (near_TD,)  # noqa: RUF005
    for j in tl.static_range(WIDTH):
        reader_T = t_T + j
        valid_T = (reader_T >= 0) & (reader_T < length)
        grad_at = grad_y + reader_T[:, None] * grad_strides[1] + d[None, :]
        grad_TD = tl.load(grad_at, mask=valid_T[:, None] & mask_D[None, :], other=0.0).to(tl.float32)
        if age is not None:
            age_T = tl.load(age + b * age_stride + reader_T, mask=valid_T, other=0)
        if SILU:
            sum_TD = tl.zeros([T_BLOCK, D_BLOCK], dtype=tl.float32)
            if bias is not None:
                sum_TD += tl.load(bias + d, mask=mask_D, other=0.0)[None, :]
            for k in tl.static_range(WIDTH):
                x_TD = others[WIDTH - 1 + j - k]
                if age is not None:
                    x_TD = tl.where((age_T >= k)[:, None], x_TD, 0.0)
                sum_TD += x_TD * tl.load(weight + k * channels + d, mask=mask_D, other=0.0)[None, :]
            open_TD = sigmoid(sum_TD)
            grad_TD *= open_TD * (1.0 + sum_TD * (1.0 - open_TD))
        if j == 0:
            tl.store(grad_taps + WIDTH * channels + d, tl.sum(grad_TD, axis=0), mask=mask_D)
        if age is not None:
            grad_TD = tl.where((age_T >= j)[:, None], grad_TD, 0.0)
        tl.store(grad_taps + j * channels + d, tl.sum(grad_TD * here_TD, axis=0), mask=mask_D)
        grad_x_TD += grad_TD * tl.load(weight + j * channels + d, mask=mask_D, other=0.0)[None, :]
    mask_TD = (t_T < length)[:, None] & mask_D[None, :]
    row_T = b * (length + WIDTH - 1) + t_T + (WIDTH - 1)
    target = grad_extended + row_T[:, None] * channels + d[None, :]
    tl.store(target, grad_x_TD.to(grad_extended.dtype.element_ty), mask=mask_TD)


def _blocks(channels: int) -> tuple[int, int, int]:
    """Tokens, channels and warps of a program."""
    if interpreting():
        return 8, min(16, power_of_two(channels)), 1
    return 16, min(128, max(16, power_of_two(channels))), 4


class TritonShortConvolution(torch.autograd.Function):
    """See `short_convolution`, which checks and prepares the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        weight_DW: Tensor,
        bias: Tensor | None,
        halo: Tensor,
        starts_BT: Tensor | None,
        silu: bool,
    ) -> Tensor:
        batch, length, channels = x_BTD.shape
        width = weight_DW.shape[1]
        x_BTD, halo, taps_WD = rows_contiguous(x_BTD), halo.contiguous(), weight_DW.t().flip(0).contiguous()
        age_BT = None if starts_BT is None else document_age(starts_BT).clamp_(max=width).to(torch.int32)
        y_BTD = torch.empty(batch, length, channels, dtype=x_BTD.dtype, device=x_BTD.device)
        tokens, block, warps = _blocks(channels)
        triton_support.launch(
            convolve_kernel, (-(-length // tokens), -(-channels // block), batch), x_BTD, taps_WD, bias, halo, age_BT,
            y_BTD, length, channels, batch_strides(x_BTD), batch_strides(age_BT)[0],
            WIDTH=width, SILU=silu, T_BLOCK=tokens, D_BLOCK=block, num_warps=warps,
        )  # fmt: skip
        ctx.save_for_backward(x_BTD, taps_WD, bias, halo, age_BT)
        ctx.silu = silu
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BTD = rows_contiguous(grads[0])
        x_BTD, taps_WD, bias, halo, age_BT = ctx.saved_tensors
        batch, length, channels = x_BTD.shape
        width = taps_WD.shape[0]
        tokens, block, warps = _blocks(channels)
        rows = -(-(length + width - 1) // tokens)
        grad_extended = torch.empty(batch, length + width - 1, channels, dtype=x_BTD.dtype, device=x_BTD.device)
        grad_taps = taps_WD.new_empty(batch * rows, width + 1, channels)
        triton_support.launch(
            gradient_kernel, (rows, -(-channels // block), batch), x_BTD, taps_WD, bias, halo, age_BT, grad_BTD,
            grad_extended, grad_taps, length, channels, batch_strides(x_BTD), batch_strides(grad_BTD),
            batch_strides(age_BT)[0], WIDTH=width, SILU=ctx.silu, T_BLOCK=tokens, D_BLOCK=block, num_warps=warps,
        )  # fmt: skip
        summed = grad_taps.sum(0)
        grad_halo, grad_x = grad_extended.split((width - 1, length), 1)
        grad_bias = None if bias is None else summed[width]
        return grad_x, summed[:width].flip(0).t(), grad_bias, grad_halo, None, None
