"""The product of RWKV-7's transitions on a GPU: segments side by side, their matrices multiplied afterwards.

With A_t = diag(w_t) + a_t b_t^T, the rows of R_t = A_1 ... A_t do not meet, so the forward shares them out over
programs and keeps R for every CHECK tokens; matrices are stored transposed, as `wkv7_transition` gives them. The
backward makes the R between them again in scratch memory and holds a whole head: with G_t the adjoint of R_t and
q_t = R_{t-1} a_t,
    db = G^T q,  da = R_{t-1}^T G b,  dw = sum over rows of G R_{t-1},  G_{t-1} = G_t diag(w) + (G_t b) a^T.

Legend: B batch, T tokens, H heads, N head width, S segments; V rows and K columns of R, both N.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_support import interpreting, power_of_two, processors, rows_contiguous


@triton.jit
def _token(x, at, t, stride, n, mask):
    return tl.load(x + at + t * stride + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _next(product_VK, w_K, a_K, b_K):
    """R A, and what R answers to a."""
    answer_V = tl.sum(product_VK * a_K[None, :], axis=1)
    return product_VK * w_K[None, :] + answer_V[:, None] * b_K[None, :], answer_V


@triton.jit
def transition_kernel(
    log_w, a, b, checkpoints, matrices, length, heads, width, segment, w_strides, a_strides, b_strides,
    V_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """V_BLOCK rows of one segment's product: before every CHECK tokens, and transposed at its end."""
    rows = tl.program_id(0).to(tl.int64) * V_BLOCK + tl.arange(0, V_BLOCK)
    keys = tl.arange(0, K_BLOCK)
    h, s = tl.program_id(1).to(tl.int64) % heads, tl.program_id(1).to(tl.int64) // heads
    batch, segments = tl.program_id(2).to(tl.int64), tl.num_programs(1) // heads
    mask_K = keys < width
    mask_VK = (rows < width)[:, None] & mask_K[None, :]
    product_VK = tl.where(rows[:, None] == keys[None, :], 1.0, 0.0)
    part = (batch * segments + s) * heads + h
    w_at, a_at = batch * w_strides[0] + h * w_strides[2], batch * a_strides[0] + h * a_strides[2]
    b_at = batch * b_strides[0] + h * b_strides[2]
    begin, stop = s * segment, tl.minimum(s * segment + segment, length)
    for i in range(0, stop - begin):
        t = begin + i
        if (t - begin) % CHECK == 0:
            kept = (part * tl.cdiv(segment, CHECK) + (t - begin) // CHECK) * width * width
            tl.store(checkpoints + kept + rows[:, None] * width + keys[None, :], product_VK, mask=mask_VK)
        w_K = tl.exp(_token(log_w, w_at, t, w_strides[1], keys, mask_K))
        a_K, b_K = _token(a, a_at, t, a_strides[1], keys, mask_K), _token(b, b_at, t, b_strides[1], keys, mask_K)
        product_VK, _ = _next(product_VK, w_K, a_K, b_K)
    tl.store(matrices + part * width * width + keys[None, :] * width + rows[:, None], product_VK, mask=mask_VK)


@triton.jit
def transition_gradient_kernel(
    log_w, a, b, checkpoints, scratch, grad_matrices, grad_w, grad_a, grad_b, length, heads, width, segment,
    w_strides, a_strides, b_strides, BLOCK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """All gradients of one head over one segment."""
    n = tl.arange(0, BLOCK)
    h, s = tl.program_id(0).to(tl.int64) % heads, tl.program_id(0).to(tl.int64) // heads
    batch, segments = tl.program_id(1).to(tl.int64), tl.num_programs(0) // heads
    mask = n < width
    mask_VK = mask[:, None] & mask[None, :]
    part = (batch * segments + s) * heads + h
    w_at, a_at = batch * w_strides[0] + h * w_strides[2], batch * a_strides[0] + h * a_strides[2]
    b_at = batch * b_strides[0] + h * b_strides[2]
    scratch += part * CHECK * BLOCK * BLOCK + n[:, None] * BLOCK + n[None, :]
    target = grad_matrices + part * width * width + n[None, :] * width + n[:, None]
    adjoint_VK = tl.load(target, mask=mask_VK, other=0.0)
    begin, stop = s * segment, tl.minimum(s * segment + segment, length)
    checks = tl.cdiv(stop - begin, CHECK)
    for i in range(0, checks):
        first = begin + (checks - 1 - i) * CHECK
        behind = tl.minimum(first + CHECK, stop)
        kept = (part * tl.cdiv(segment, CHECK) + (checks - 1 - i)) * width * width
        product_VK = tl.load(checkpoints + kept + n[:, None] * width + n[None, :], mask=mask_VK, other=0.0)
        for j in range(0, behind - first):
            t = first + j
            tl.store(scratch + (t - first) * BLOCK * BLOCK, product_VK)
            w_K = tl.exp(_token(log_w, w_at, t, w_strides[1], n, mask))
            a_K, b_K = _token(a, a_at, t, a_strides[1], n, mask), _token(b, b_at, t, b_strides[1], n, mask)
            product_VK, _ = _next(product_VK, w_K, a_K, b_K)
        tl.debug_barrier()
        for j in range(0, behind - first):
            t = behind - 1 - j
            before_VK = tl.load(scratch + (t - first) * BLOCK * BLOCK)
            w_K = tl.exp(_token(log_w, w_at, t, w_strides[1], n, mask))
            a_K, b_K = _token(a, a_at, t, a_strides[1], n, mask), _token(b, b_at, t, b_strides[1], n, mask)
            answer_V = tl.sum(before_VK * a_K[None, :], axis=1)
            grad_answer_V = tl.sum(adjoint_VK * b_K[None, :], axis=1)
            grad_w_K = tl.sum(adjoint_VK * before_VK, axis=0) * w_K
            grad_b_K = tl.sum(adjoint_VK * answer_V[:, None], axis=0)
            grad_a_K = tl.sum(before_VK * grad_answer_V[:, None], axis=0)
            row = ((batch * length + t) * heads + h) * width + n
            tl.store(grad_w + row, grad_w_K.to(grad_w.dtype.element_ty), mask=mask)
            tl.store(grad_a + row, grad_a_K.to(grad_a.dtype.element_ty), mask=mask)
            tl.store(grad_b + row, grad_b_K.to(grad_b.dtype.element_ty), mask=mask)
            adjoint_VK = adjoint_VK * w_K[None, :] + grad_answer_V[:, None] * a_K[None, :]
        tl.debug_barrier()


def _check() -> int:
    return 4 if interpreting() else 32


def _segments(batch: int, length: int, heads: int, device: torch.device) -> tuple[int, int]:
    """(tokens of a segment, segments): enough of them to keep a GPU busy, each much longer than a head is wide."""
    least = 12 if interpreting() else 512
    wanted = max(1, 4 * processors(device) // (batch * heads))
    check = _check()
    segment = max(least, -(-length // (check * wanted)) * check)
    return segment, -(-length // segment)


def _strides(x_BTHN: Tensor) -> tuple[int, int, int]:
    return x_BTHN.stride(0), x_BTHN.stride(1), x_BTHN.stride(2)


class TritonTransitions(torch.autograd.Function):
    """(B, S, H, N, N): the matrix of each segment."""

    @staticmethod
    def forward(ctx: Any, log_w_BTHN: Tensor, a_BTHN: Tensor, b_BTHN: Tensor) -> Tensor:
        batch, length, heads, width = log_w_BTHN.shape
        sequences, check = [rows_contiguous(x) for x in (log_w_BTHN, a_BTHN, b_BTHN)], _check()
        segment, segments = _segments(batch, length, heads, log_w_BTHN.device)
        block = power_of_two(width)
        rows = block if interpreting() else min(16, block)
        matrices = torch.empty(batch, segments, heads, width, width, dtype=torch.float32, device=log_w_BTHN.device)
        checkpoints = matrices.new_empty(batch, segments, heads, -(-segment // check), width, width)
        triton_support.launch(
            transition_kernel, (-(-width // rows), segments * heads, batch), *sequences, checkpoints, matrices,
            length, heads, width, segment, *(_strides(x) for x in sequences), V_BLOCK=rows, K_BLOCK=block,
            CHECK=check, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(*sequences, checkpoints)
        return matrices

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *sequences, checkpoints = ctx.saved_tensors
        batch, length, heads, width = sequences[0].shape
        segment, segments = _segments(batch, length, heads, checkpoints.device)
        block, check = power_of_two(width), _check()
        results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sequences]
        scratch = checkpoints.new_empty(batch, segments, heads, check, block, block)
        triton_support.launch(
            transition_gradient_kernel, (segments * heads, batch), *sequences, checkpoints, scratch,
            grads[0].contiguous(), *results, length, heads, width, segment, *(_strides(x) for x in sequences),
            BLOCK=block, CHECK=check, num_warps=4 if block < 128 else 8,
        )  # fmt: skip
        return tuple(results)


def transition(log_w_BTHN: Tensor, a_BTHN: Tensor, b_BTHN: Tensor) -> Tensor:
    """See `wkv7_transition`: later segments act from the left; neighbours are multiplied until one matrix is left."""
    matrices = TritonTransitions.apply(log_w_BTHN, a_BTHN, b_BTHN)
    while (count := matrices.shape[1]) > 1:
        pairs = matrices[:, 1::2] @ matrices[:, : count - count % 2 : 2]
        matrices = torch.cat((pairs, matrices[:, -1:]), 1) if count % 2 else pairs
    return matrices[:, 0]
