"""RWKV-7's recurrence on a GPU: one sequential walk per head with the state in registers.

S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T and y_t = S_t r_t. Rows of S (values) do not meet, so the forward
shares them out over programs. The forward keeps a state for every CHECK tokens; the backward makes those between them
again in scratch memory and holds a whole head, because the gradients of r, w, k, a and b are sums over the rows:
with G_t the adjoint of S_t and q_t = S_{t-1} a_t,
    dr = S_t^T dy,  dv = G k,  dk = G^T v,  db = G^T q,  da = S_{t-1}^T G b,  dw = sum_v G S_{t-1},
    G_{t-1} = G_t diag(w) + (G_t b) a^T + dy_{t-1} r_{t-1}^T.

Legend: B batch, T tokens, H heads, N head width; V values (rows) and K keys (columns) of a state, both N.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_support import as_bytes, batch_strides, interpreting, power_of_two

WIDEST = 128  # head width that a program holds


@triton.jit
def _row(x, at, n, mask):
    return tl.load(x + at + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step(state_VK, w_K, k_K, v_V, a_K, b_K):
    """The next state, and what the old one answers to a."""
    answer_V = tl.sum(state_VK * a_K[None, :], axis=1)
    return state_VK * w_K[None, :] + answer_V[:, None] * b_K[None, :] + v_V[:, None] * k_K[None, :], answer_V


@triton.jit
def wkv7_kernel(
    r, log_w, k, v, a, b, starts, initial, checkpoints, y, final, length, heads, width, starts_stride,
    V_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Outputs of V_BLOCK rows, their state before every CHECK tokens, and the last one."""
    first, i = tl.program_id(0).to(tl.int64) * V_BLOCK, tl.arange(0, V_BLOCK)
    rows = first + i
    h, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = tl.arange(0, K_BLOCK)
    mask_V, mask_K = rows < width, keys < width
    mask_VK = mask_V[:, None] & mask_K[None, :]
    offset_VK = i[:, None] * width + keys[None, :]
    whole = (batch * heads + h) * width * width + first * width
    state_VK = tl.load(initial + whole + offset_VK, mask=mask_VK, other=0.0)
    checks = tl.cdiv(length, CHECK)
    for t in range(0, length):
        if t % CHECK == 0:
            kept = ((batch * heads + h) * checks + t // CHECK) * width * width + first * width
            tl.store(checkpoints + kept + offset_VK, state_VK, mask=mask_VK)
        if starts is not None:
            state_VK = tl.where(tl.load(starts + batch * starts_stride + t) != 0, 0.0, state_VK)
        at = ((batch * length + t) * heads + h) * width
        w_K, k_K = tl.exp(_row(log_w, at, keys, mask_K)), _row(k, at, keys, mask_K)
        a_K, b_K = _row(a, at, keys, mask_K), _row(b, at, keys, mask_K)
        state_VK, _ = _step(state_VK, w_K, k_K, _row(v, at, rows, mask_V), a_K, b_K)
        y_V = tl.sum(state_VK * _row(r, at, keys, mask_K)[None, :], axis=1)
        tl.store(y + at + rows, y_V.to(y.dtype.element_ty), mask=mask_V)
    tl.store(final + whole + offset_VK, state_VK, mask=mask_VK)


@triton.jit
def wkv7_gradient_kernel(
    r, log_w, k, v, a, b, starts, checkpoints, scratch, grad_y, grad_final,
    grad_r, grad_w, grad_k, grad_v, grad_a, grad_b, grad_initial, length, heads, width, starts_stride,
    BLOCK: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of one sequence."""
    h, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK)
    mask = n < width
    mask_VK = mask[:, None] & mask[None, :]
    offset_VK = n[:, None] * width + n[None, :]
    scratch_VK = n[:, None] * BLOCK + n[None, :]
    checks = tl.cdiv(length, CHECK)
    scratch += (batch * heads + h) * CHECK * BLOCK * BLOCK
    adjoint_VK = tl.load(grad_final + (batch * heads + h) * width * width + offset_VK, mask=mask_VK, other=0.0)
    for i in range(0, checks):
        begin = (checks - 1 - i) * CHECK
        kept = checkpoints + ((batch * heads + h) * checks + (checks - 1 - i)) * width * width
        state_VK = tl.load(kept + offset_VK, mask=mask_VK, other=0.0)
        stop = tl.minimum(begin + CHECK, length)
        for t in range(begin, stop):
            if starts is not None:
                state_VK = tl.where(tl.load(starts + batch * starts_stride + t) != 0, 0.0, state_VK)
            tl.store(scratch + tl.cast(t - begin, tl.int64) * BLOCK * BLOCK + scratch_VK, state_VK)
            at = ((batch * length + t) * heads + h) * width
            w_K, k_K, v_V = tl.exp(_row(log_w, at, n, mask)), _row(k, at, n, mask), _row(v, at, n, mask)
            state_VK, _ = _step(state_VK, w_K, k_K, v_V, _row(a, at, n, mask), _row(b, at, n, mask))
        tl.debug_barrier()
        for j in range(0, stop - begin):
            t = stop - 1 - j
            at = ((batch * length + t) * heads + h) * width
            before_VK = tl.load(scratch + tl.cast(t - begin, tl.int64) * BLOCK * BLOCK + scratch_VK)
            w_K, k_K, v_V = tl.exp(_row(log_w, at, n, mask)), _row(k, at, n, mask), _row(v, at, n, mask)
            a_K, b_K, r_K = _row(a, at, n, mask), _row(b, at, n, mask), _row(r, at, n, mask)
            dy_V = _row(grad_y, at, n, mask)
            after_VK, answer_V = _step(before_VK, w_K, k_K, v_V, a_K, b_K)
            adjoint_VK += dy_V[:, None] * r_K[None, :]
            grad_answer_V = tl.sum(adjoint_VK * b_K[None, :], axis=1)
            grad_r_K = tl.sum(after_VK * dy_V[:, None], axis=0)
            grad_w_K = tl.sum(adjoint_VK * before_VK, axis=0) * w_K
            grad_k_K = tl.sum(adjoint_VK * v_V[:, None], axis=0)
            grad_b_K = tl.sum(adjoint_VK * answer_V[:, None], axis=0)
            grad_a_K = tl.sum(before_VK * grad_answer_V[:, None], axis=0)
            grad_v_V = tl.sum(adjoint_VK * k_K[None, :], axis=1)
            tl.store(grad_r + at + n, grad_r_K.to(grad_r.dtype.element_ty), mask=mask)
            tl.store(grad_w + at + n, grad_w_K.to(grad_w.dtype.element_ty), mask=mask)
            tl.store(grad_k + at + n, grad_k_K.to(grad_k.dtype.element_ty), mask=mask)
            tl.store(grad_v + at + n, grad_v_V.to(grad_v.dtype.element_ty), mask=mask)
            tl.store(grad_a + at + n, grad_a_K.to(grad_a.dtype.element_ty), mask=mask)
            tl.store(grad_b + at + n, grad_b_K.to(grad_b.dtype.element_ty), mask=mask)
            adjoint_VK = adjoint_VK * w_K[None, :] + grad_answer_V[:, None] * a_K[None, :]
            if starts is not None:
                adjoint_VK = tl.where(tl.load(starts + batch * starts_stride + t) != 0, 0.0, adjoint_VK)
        tl.debug_barrier()
    tl.store(grad_initial + (batch * heads + h) * width * width + offset_VK, adjoint_VK, mask=mask_VK)


def _check() -> int:
    return 4 if interpreting() else 32


class TritonWkv7(torch.autograd.Function):
    """The recurrence in Triton kernels; call it through `wkv7`, which checks and prepares the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        log_w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state_BHNN: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, width = r.shape
        sequences, starts = [x.contiguous() for x in (r, log_w, k, v, a, b)], as_bytes(starts_BT)
        state_BHNN, check = state_BHNN.contiguous(), _check()
        block = power_of_two(width)
        rows = block if interpreting() else min(16, block)
        checkpoints = state_BHNN.new_empty(batch, heads, -(-length // check), width, width)
        y = torch.empty(r.shape, dtype=r.dtype, device=r.device)
        final = torch.empty_like(state_BHNN)
        triton_support.launch(
            wkv7_kernel, (-(-width // rows), heads, batch), *sequences, starts, state_BHNN, checkpoints, y, final,
            length, heads, width, batch_strides(starts)[0], V_BLOCK=rows, K_BLOCK=block, CHECK=check, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(*sequences, starts, checkpoints)
        return y, final

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *sequences, starts, checkpoints = ctx.saved_tensors
        batch, length, heads, width = sequences[0].shape
        block, check = power_of_two(width), _check()
        results = [torch.empty_like(x) for x in sequences]
        grad_initial = checkpoints.new_empty(batch, heads, width, width)
        scratch = checkpoints.new_empty(batch, heads, check, block, block)
        triton_support.launch(
            wkv7_gradient_kernel, (heads, batch), *sequences, starts, checkpoints, scratch, grads[0].contiguous(),
            grads[1].contiguous(), *results, grad_initial, length, heads, width, batch_strides(starts)[0],
            BLOCK=block, CHECK=check, num_warps=4 if block < 128 else 8,
        )  # fmt: skip
        return *results, grad_initial, None
