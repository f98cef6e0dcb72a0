"""RWKV-4's recurrence on a GPU: one sequential walk per channel with the state in registers.

Takes the place of portable.Wkv4, argument for argument. The forward keeps one state for every few tokens; the backward
makes the states between them again, in registers. The exponent only chooses a representation: derivatives take it as a
constant, and what the final state's gradient holds beyond that goes to the key that set the exponent.

Legend: B batch, T tokens, D channels (of a block inside kernels). A state is (a, b, p): numerator a e^p, denominator
b e^p; in memory (3, B, D).
"""

# The type checker takes triton.language.static_range for something that cannot be iterated.
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..documents import document_age
from ..triton_math import load_keeps, load_rows
from ..triton_support import as_bytes, batch_strides, interpreting, power_of_two, rows_contiguous


@triton.jit
def _forget(a_D, b_D, p_D, keep):
    """Nothing, where a document begins (keep is zero)."""
    return a_D * keep, b_D * keep, tl.where(keep == 0.0, -1e38, p_D)


@triton.jit
def _advance(a_D, b_D, p_D, k_D, v_D, decay_D):
    """The next state, and what of the old one and of the token is in it."""
    next_D = tl.maximum(p_D + decay_D, k_D)
    kept_D, new_D = tl.exp(p_D + decay_D - next_D), tl.exp(k_D - next_D)
    return kept_D * a_D + new_D * v_D, kept_D * b_D + new_D, next_D, kept_D, new_D


@triton.jit
def wkv4_kernel(
    k, v, log_decay, bonus, starts, initial, checkpoints, y, final, length, channels,
    k_strides, v_strides, starts_stride, D_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Outputs, the state before every TILE tokens, and the last one."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    b = tl.program_id(1).to(tl.int64)
    mask_D = d < channels
    part = tl.num_programs(1).to(tl.int64) * channels
    tiles = tl.cdiv(length, TILE)
    zero = tl.program_id(1).to(tl.int64) * 0
    decay_D, bonus_D = tl.load(log_decay + d, mask=mask_D, other=0.0), tl.load(bonus + d, mask=mask_D, other=0.0)
    at = b * channels + d
    a_D, b_D = tl.load(initial + at, mask=mask_D, other=0.0), tl.load(initial + part + at, mask=mask_D, other=0.0)
    p_D = tl.load(initial + 2 * part + at, mask=mask_D, other=0.0)
    k += b * k_strides[0]
    v += b * v_strides[0]
    if starts is not None:
        starts += b * starts_stride
    for i in range(0, tiles):
        first = zero + i * TILE
        kept = checkpoints + (b * tiles + i) * 3 * channels + d
        tl.store(kept, a_D, mask=mask_D)
        tl.store(kept + channels, b_D, mask=mask_D)
        tl.store(kept + 2 * channels, p_D, mask=mask_D)
        ks = load_rows(k, k_strides[1], first, length, d, mask_D, TILE)
        vs = load_rows(v, v_strides[1], first, length, d, mask_D, TILE)
        keeps = load_keeps(starts, first, length, TILE)
        for j in tl.static_range(TILE):
            if first + j < length:
                if starts is not None:
                    a_D, b_D, p_D = _forget(a_D, b_D, p_D, keeps[j])
                own_D = ks[j] + bonus_D
                larger_D = tl.maximum(p_D, own_D)
                past_D, now_D = tl.exp(p_D - larger_D), tl.exp(own_D - larger_D)
                y_D = (past_D * a_D + now_D * vs[j]) / (past_D * b_D + now_D)
                tl.store(y + (b * length + first + j) * channels + d, y_D.to(y.dtype.element_ty), mask=mask_D)
                a_D, b_D, p_D, _, _ = _advance(a_D, b_D, p_D, ks[j], vs[j], decay_D)
    tl.store(final + at, a_D, mask=mask_D)
    tl.store(final + part + at, b_D, mask=mask_D)
    tl.store(final + 2 * part + at, p_D, mask=mask_D)


@triton.jit
def wkv4_gradient_kernel(
    k, v, log_decay, bonus, starts, checkpoints, grad_y, grad_final,
    grad_k, grad_v, grad_decay, grad_bonus, grad_initial,
    length, channels, k_strides, v_strides, grad_strides, starts_stride, D_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All gradients at constant exponents; those of decay and bonus summed over the sequence's tokens."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    b = tl.program_id(1).to(tl.int64)
    mask_D = d < channels
    part = tl.num_programs(1).to(tl.int64) * channels
    tiles = tl.cdiv(length, TILE)
    zero = tl.program_id(1).to(tl.int64) * 0
    decay_D, bonus_D = tl.load(log_decay + d, mask=mask_D, other=0.0), tl.load(bonus + d, mask=mask_D, other=0.0)
    at = b * channels + d
    alpha_D = tl.load(grad_final + at, mask=mask_D, other=0.0)
    beta_D = tl.load(grad_final + part + at, mask=mask_D, other=0.0)
    sum_decay_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    sum_bonus_D = tl.zeros([D_BLOCK], dtype=tl.float32)
    k += b * k_strides[0]
    v += b * v_strides[0]
    grad_y += b * grad_strides[0]
    if starts is not None:
        starts += b * starts_stride
    for i in range(0, tiles):
        tile = tiles - 1 - i
        first = zero + tile * TILE
        kept = checkpoints + (b * tiles + tile) * 3 * channels + d
        a_D, b_D = tl.load(kept, mask=mask_D, other=0.0), tl.load(kept + channels, mask=mask_D, other=0.0)
        p_D = tl.load(kept + 2 * channels, mask=mask_D, other=0.0)
        ks = load_rows(k, k_strides[1], first, length, d, mask_D, TILE)
        vs = load_rows(v, v_strides[1], first, length, d, mask_D, TILE)
        grads = load_rows(grad_y, grad_strides[1], first, length, d, mask_D, TILE)
        keeps = load_keeps(starts, first, length, TILE)
        as_, bs, ps = (), (), ()
        for j in tl.static_range(TILE):  # behind the end nothing is read of what this makes
            if starts is not None:
                a_D, b_D, p_D = _forget(a_D, b_D, p_D, keeps[j])
            as_, bs, ps = as_ + (a_D,), bs + (b_D,), ps + (p_D,)  # noqa: RUF005
            a_D, b_D, p_D, _, _ = _advance(a_D, b_D, p_D, ks[j], vs[j], decay_D)
        for j in tl.static_range(TILE):
            token = first + (TILE - 1 - j)
            if token < length:
                a_D, b_D, p_D = as_[TILE - 1 - j], bs[TILE - 1 - j], ps[TILE - 1 - j]
                k_D, v_D, dy_D = ks[TILE - 1 - j], vs[TILE - 1 - j], grads[TILE - 1 - j]
                _, _, _, kept_D, new_D = _advance(a_D, b_D, p_D, k_D, v_D, decay_D)
                own_D = k_D + bonus_D
                larger_D = tl.maximum(p_D, own_D)
                past_D, now_D = tl.exp(p_D - larger_D), tl.exp(own_D - larger_D)
                below_D = past_D * b_D + now_D
                y_D = (past_D * a_D + now_D * v_D) / below_D
                grad_above_D = dy_D / below_D
                grad_below_D = -grad_above_D * y_D
                # now (v - y), written so that nothing cancels where the token outweighs the past
                grad_own_D = now_D * past_D * (b_D * v_D - a_D) / below_D * grad_above_D
                sum_bonus_D += grad_own_D
                sum_decay_D += kept_D * (a_D * alpha_D + b_D * beta_D)
                grad_k_D = grad_own_D + new_D * (v_D * alpha_D + beta_D)
                grad_v_D = now_D * grad_above_D + new_D * alpha_D
                row = (b * length + token) * channels + d
                tl.store(grad_k + row, grad_k_D.to(grad_k.dtype.element_ty), mask=mask_D)
                tl.store(grad_v + row, grad_v_D.to(grad_v.dtype.element_ty), mask=mask_D)
                alpha_D = (kept_D * alpha_D + past_D * grad_above_D) * keeps[TILE - 1 - j]
                beta_D = (kept_D * beta_D + past_D * grad_below_D) * keeps[TILE - 1 - j]
    tl.store(grad_decay + at, sum_decay_D, mask=mask_D)
    tl.store(grad_bonus + at, sum_bonus_D, mask=mask_D)
    tl.store(grad_initial + at, alpha_D, mask=mask_D)
    tl.store(grad_initial + part + at, beta_D, mask=mask_D)


def _options(channels: int) -> dict[str, int]:
    if interpreting():
        return {"D_BLOCK": min(16, power_of_two(channels)), "TILE": 4, "num_warps": 1}
    return {"D_BLOCK": 32, "TILE": 8, "num_warps": 1}


class TritonWkv4(torch.autograd.Function):
    """The recurrence in Triton kernels; call it through `wkv4`, which checks and prepares the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        k_BTD: Tensor,
        v_BTD: Tensor,
        log_decay_D: Tensor,
        bonus_D: Tensor,
        state_BD3: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = k_BTD.shape
        k_BTD, v_BTD = rows_contiguous(k_BTD), rows_contiguous(v_BTD)
        log_decay_D, bonus_D = log_decay_D.contiguous(), bonus_D.contiguous()
        options = _options(channels)
        initial_3BD = state_BD3.movedim(2, 0).contiguous()
        checkpoints = initial_3BD.new_empty(batch, -(-length // options["TILE"]), 3, channels)
        y_BTD, final_3BD = torch.empty_like(v_BTD, memory_format=torch.contiguous_format), torch.empty_like(initial_3BD)
        starts = as_bytes(starts_BT)
        triton_support.launch(
            wkv4_kernel, (-(-channels // options["D_BLOCK"]), batch), k_BTD, v_BTD, log_decay_D, bonus_D, starts,
            initial_3BD, checkpoints, y_BTD, final_3BD, length, channels, batch_strides(k_BTD), batch_strides(v_BTD),
            batch_strides(starts)[0], **options,
        )  # fmt: skip
        ctx.save_for_backward(k_BTD, v_BTD, log_decay_D, bonus_D, starts_BT, state_BD3, checkpoints, final_3BD)
        return y_BTD, final_3BD.movedim(0, 2).contiguous()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BTD, grad_final = rows_contiguous(grads[0]), grads[1].movedim(2, 0).contiguous()
        k_BTD, v_BTD, log_decay_D, bonus_D, starts_BT, state_BD3, checkpoints, final_3BD = ctx.saved_tensors
        batch, length, channels = k_BTD.shape
        options, starts = _options(channels), as_bytes(starts_BT)
        grad_k = torch.empty(k_BTD.shape, dtype=k_BTD.dtype, device=k_BTD.device)
        grad_v = torch.empty(v_BTD.shape, dtype=v_BTD.dtype, device=v_BTD.device)
        grad_decay, grad_bonus = log_decay_D.new_empty(2, batch, channels).unbind(0)
        grad_initial = torch.empty_like(final_3BD)
        triton_support.launch(
            wkv4_gradient_kernel, (-(-channels // options["D_BLOCK"]), batch), k_BTD, v_BTD, log_decay_D, bonus_D,
            starts, checkpoints, grad_BTD, grad_final, grad_k, grad_v, grad_decay, grad_bonus, grad_initial,
            length, channels, batch_strides(k_BTD), batch_strides(v_BTD), batch_strides(grad_BTD),
            batch_strides(starts)[0], **options,
        )  # fmt: skip
        # A larger exponent with the same a and b is a larger state: the initial exponent's gradient at constant state.
        initial = state_BD3.movedim(2, 0)
        grad_initial[2] = (grad_initial[:2] * initial[:2]).sum(0)
        excess_BD = grad_final[2] - (grad_final[:2] * final_3BD[:2]).sum(0)
        grad_decay = grad_decay + _to_the_key_that_set_it(
            excess_BD, k_BTD, log_decay_D, initial[2], starts_BT, grad_k, grad_initial
        )
        return grad_k, grad_v, grad_decay.sum(0), grad_bonus.sum(0), grad_initial.movedim(0, 2), None


def _to_the_key_that_set_it(
    excess_BD: Tensor,
    k_BTD: Tensor,
    log_decay_D: Tensor,
    initial_BD: Tensor,
    starts_BT: Tensor | None,
    grad_k: Tensor,
    grad_initial: Tensor,
) -> Tensor:
    """Add the gradient of the last exponent to its source; returns its part in the decay's gradient, (B, D).

    The last exponent is the largest of all keys of the last document, and of the initial one, each with its decay.
    """
    length = k_BTD.shape[1]
    age_T1 = torch.arange(length - 1, -1, -1, device=k_BTD.device, dtype=log_decay_D.dtype).unsqueeze(1)
    score_BTD = k_BTD + age_T1 * log_decay_D
    first_BD = initial_BD + length * log_decay_D
    if starts_BT is not None:
        here_BT = age_T1.squeeze(1) <= document_age(starts_BT)[:, -1:]
        score_BTD = score_BTD.masked_fill(~here_BT.unsqueeze(2), -torch.inf)
        first_BD = first_BD.masked_fill(starts_BT.any(1).unsqueeze(1), -torch.inf)
    best_BD, token_BD = score_BTD.max(1)
    from_key_BD = best_BD >= first_BD
    to_key_BD = torch.where(from_key_BD, excess_BD, 0.0)
    grad_k.scatter_add_(1, token_BD.unsqueeze(1), to_key_BD.unsqueeze(1).to(grad_k.dtype))
    grad_initial[2] += excess_BD - to_key_BD
    return excess_BD * torch.where(from_key_BD, length - 1 - token_BD, length)
