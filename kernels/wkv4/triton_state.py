"""RWKV-4's state alone on a GPU: no walk, a weighted sum of the last document's tokens.

Takes the place of portable.summary_segment walked over the sequence. With p the largest of k_t + (T-1-t) log decay, a
token weighs exp(k_t + (T-1-t) log decay - p); numerator and denominator are sums, taken segment by segment side by side
and then over the segments. The exponent only chooses a representation: derivatives take it as a constant, and what the
state's gradient holds beyond that goes to the key that set it.

Legend: B batch, T tokens (of a tile inside kernels), D channels (of a block inside kernels), S segments. A state is
(a, b, p): numerator a e^p, denominator b e^p.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_support import batch_strides, interpreting, power_of_two, processors, rows_contiguous


@triton.jit
def wkv4_state_kernel(
    k, v, log_decay, begins, states, latest, length, channels, segment, k_strides, v_strides, begins_stride,
    D_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """The state that the tokens of one segment leave at its end, and the token that set the exponent."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    part = b * tl.num_programs(1) + s
    k += b * k_strides[0]
    v += b * v_strides[0]
    mask_D = d < channels
    decay_D = tl.load(log_decay + d, mask=mask_D, other=0.0)
    first, stop = s * segment, tl.minimum(s * segment + segment, length)
    begin = tl.load(begins + b * begins_stride)
    a_D, b_D = tl.zeros([D_BLOCK], dtype=tl.float32), tl.zeros([D_BLOCK], dtype=tl.float32)
    p_D = tl.full([D_BLOCK], -1e38, dtype=tl.float32)
    latest_D = tl.full([D_BLOCK], -1, dtype=tl.int64)
    for i in range(0, segment, T_BLOCK):
        t = first + i + tl.arange(0, T_BLOCK)
        counts_T = (t < stop) & (t >= begin)
        mask_TD = counts_T[:, None] & mask_D[None, :]
        k_TD = tl.load(k + t[:, None] * k_strides[1] + d[None, :], mask=mask_TD, other=0.0).to(tl.float32)
        v_TD = tl.load(v + t[:, None] * v_strides[1] + d[None, :], mask=mask_TD, other=0.0).to(tl.float32)
        exponent_TD = k_TD + (stop - 1 - t).to(tl.float32)[:, None] * decay_D[None, :]
        exponent_TD = tl.where(mask_TD, exponent_TD, -1e38)
        highest_D = tl.max(exponent_TD, axis=0)
        token_D = tl.max(tl.where(mask_TD & (exponent_TD == highest_D[None, :]), t[:, None], -1), axis=0)
        latest_D = tl.where(highest_D >= p_D, token_D, latest_D)
        higher_D = tl.maximum(p_D, highest_D)
        kept_D = tl.exp(p_D - higher_D)
        weight_TD = tl.where(mask_TD, tl.exp(exponent_TD - higher_D[None, :]), 0.0)
        a_D = a_D * kept_D + tl.sum(weight_TD * v_TD, axis=0)
        b_D = b_D * kept_D + tl.sum(weight_TD, axis=0)
        p_D = higher_D
    tl.store(states + part * 3 * channels + d, a_D, mask=mask_D)
    tl.store(states + (part * 3 + 1) * channels + d, b_D, mask=mask_D)
    tl.store(states + (part * 3 + 2) * channels + d, p_D, mask=mask_D)
    tl.store(latest + part * channels + d, latest_D, mask=mask_D)


@triton.jit
def wkv4_state_gradient_kernel(
    k, v, log_decay, begins, exponent, latest, grad_state, excess, grad_k, grad_v, grad_decay,
    length, channels, segment, k_strides, v_strides, begins_stride, D_BLOCK: tl.constexpr, T_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment's keys and values, and what its tokens add to that of the decay.

    `exponent`, `latest` and `excess` are (B, D), `grad_state` (2, B, D): of numerator and denominator.
    """
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    part = b * tl.num_programs(1) + s
    at = b * channels + d
    k += b * k_strides[0]
    v += b * v_strides[0]
    mask_D = d < channels
    decay_D = tl.load(log_decay + d, mask=mask_D, other=0.0)
    first, stop = s * segment, tl.minimum(s * segment + segment, length)
    begin = tl.load(begins + b * begins_stride)
    alpha_D = tl.load(grad_state + at, mask=mask_D, other=0.0)
    beta_D = tl.load(grad_state + tl.num_programs(2).to(tl.int64) * channels + at, mask=mask_D, other=0.0)
    behind_D = (length - stop).to(tl.float32) * decay_D - tl.load(exponent + at, mask=mask_D, other=0.0)
    latest_D, excess_D = tl.load(latest + at, mask=mask_D, other=-1), tl.load(excess + at, mask=mask_D, other=0.0)
    sum_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    for i in range(0, segment, T_BLOCK):
        t = first + i + tl.arange(0, T_BLOCK)
        counts_T, inside_T = (t < stop) & (t >= begin), t < stop
        mask_TD = counts_T[:, None] & mask_D[None, :]
        k_TD = tl.load(k + t[:, None] * k_strides[1] + d[None, :], mask=mask_TD, other=0.0).to(tl.float32)
        v_TD = tl.load(v + t[:, None] * v_strides[1] + d[None, :], mask=mask_TD, other=0.0).to(tl.float32)
        exponent_TD = k_TD + (stop - 1 - t).to(tl.float32)[:, None] * decay_D[None, :]
        weight_TD = tl.exp(tl.where(mask_TD, exponent_TD + behind_D[None, :], -1e38))
        grad_k_TD = weight_TD * (v_TD * alpha_D[None, :] + beta_D[None, :])
        grad_k_TD += tl.where(t[:, None] == latest_D[None, :], excess_D[None, :], 0.0)
        sum_D += tl.sum(grad_k_TD * (length - 1 - t).to(tl.float32)[:, None], axis=0)
        row_TD, stored_TD = (b * length + t)[:, None] * channels, inside_T[:, None] & mask_D[None, :]
        tl.store(grad_k + row_TD + d[None, :], grad_k_TD.to(grad_k.dtype.element_ty), mask=stored_TD)
        grad_v_TD = weight_TD * alpha_D[None, :]
        tl.store(grad_v + row_TD + d[None, :], grad_v_TD.to(grad_v.dtype.element_ty), mask=stored_TD)
    tl.store(grad_decay + part * channels + d, sum_D, mask=mask_D)


def _plan(k_BTD: Tensor) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Grid, tokens of a segment, options: enough segments to keep a GPU busy."""
    batch, length, channels = k_BTD.shape
    if interpreting():
        options = {"D_BLOCK": min(16, power_of_two(channels)), "T_BLOCK": 4, "num_warps": 1}
    else:
        options = {"D_BLOCK": min(64, power_of_two(channels)), "T_BLOCK": 16, "num_warps": 4}
    blocks, tile = -(-channels // options["D_BLOCK"]), options["T_BLOCK"]
    wanted = max(1, 8 * processors(k_BTD.device) // (blocks * batch))
    segment = max(2, -(-length // (tile * wanted))) * tile
    return (blocks, -(-length // segment), batch), segment, options


class TritonWkv4State(torch.autograd.Function):
    """The last state in Triton kernels; call it through `wkv4_state`, which checks and prepares the arguments."""

    @staticmethod
    def forward(ctx: Any, k_BTD: Tensor, v_BTD: Tensor, log_decay_D: Tensor, starts_BT: Tensor | None) -> Tensor:
        batch, length, channels = k_BTD.shape
        k_BTD, v_BTD, log_decay_D = rows_contiguous(k_BTD), rows_contiguous(v_BTD), log_decay_D.contiguous()
        begins = torch.zeros(1, dtype=torch.int64, device=k_BTD.device)
        if starts_BT is not None:
            begins = (starts_BT * torch.arange(length, device=k_BTD.device)).amax(1)
        grid, segment, options = _plan(k_BTD)
        parts_BS3D = log_decay_D.new_empty(batch, grid[1], 3, channels)
        latest_BSD = begins.new_empty(batch, grid[1], channels)
        triton_support.launch(
            wkv4_state_kernel, grid, k_BTD, v_BTD, log_decay_D, begins, parts_BS3D, latest_BSD, length, channels,
            segment, batch_strides(k_BTD), batch_strides(v_BTD), int(len(begins) > 1), **options,
        )  # fmt: skip
        a_BSD, b_BSD, p_BSD = parts_BS3D.unbind(2)
        stop_S = torch.arange(1, grid[1] + 1, device=k_BTD.device).mul_(segment).clamp_max_(length)
        p_BSD = p_BSD + (length - stop_S).to(p_BSD.dtype).unsqueeze(1) * log_decay_D
        p_BD, which_BD = p_BSD.max(1)
        weight_BSD = (p_BSD - p_BD.unsqueeze(1)).exp_()
        latest_BD = latest_BSD.gather(1, which_BD.unsqueeze(1)).squeeze(1)
        state_BD3 = torch.stack(((weight_BSD * a_BSD).sum(1), (weight_BSD * b_BSD).sum(1), p_BD), -1)
        ctx.save_for_backward(k_BTD, v_BTD, log_decay_D, begins, latest_BD, state_BD3)
        return state_BD3

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BD3,) = grads
        k_BTD, v_BTD, log_decay_D, begins, latest_BD, state_BD3 = ctx.saved_tensors
        excess_BD = grad_BD3[..., 2] - (grad_BD3[..., :2] * state_BD3[..., :2]).sum(-1)
        grid, segment, options = _plan(k_BTD)
        grad_k = torch.empty(k_BTD.shape, dtype=k_BTD.dtype, device=k_BTD.device)
        grad_v = torch.empty(v_BTD.shape, dtype=v_BTD.dtype, device=v_BTD.device)
        grad_decay = log_decay_D.new_empty(k_BTD.shape[0], grid[1], len(log_decay_D))
        triton_support.launch(
            wkv4_state_gradient_kernel, grid, k_BTD, v_BTD, log_decay_D, begins, state_BD3[..., 2].contiguous(),
            latest_BD, grad_BD3[..., :2].movedim(2, 0).contiguous(), excess_BD, grad_k, grad_v, grad_decay,
            *k_BTD.shape[1:], segment, batch_strides(k_BTD), batch_strides(v_BTD), int(len(begins) > 1), **options,
        )  # fmt: skip
        return grad_k, grad_v, grad_decay.sum((0, 1)), None
