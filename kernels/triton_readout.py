"""What a matrix state that enters adds to the outputs, on a GPU: y_t = S^T (C_t exp(sum of log decays up to t)).

For the state-space dual (one decay for a head, C shared by a group of heads) and for gated linear attention (one decay
for each key, C its queries). Chunks whose decays have left nothing that float32 could show are not computed. A document
start is a log decay of minus infinity.

Legend: B batch, T tokens, H heads, G groups of heads, N rows of a state (states or keys), P its columns, W log decays
of a head (1 or N), M chunks, Q tokens of one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import triton_support
from .autograd import first_order
from .living import negligible_exponent, suffix_sums
from .triton_math import dot_type, load_tile
from .triton_support import interpreting, power_of_two, rows_contiguous

WIDEST = 128  # rows and columns of a state that a program holds


@triton.jit
def readout_kernel(
    state, log_decay, before, C, y, length, heads, groups, rows, columns, decays, chunks, C_strides, cutoff,
    Q: tl.constexpr, N_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs of one head of a chunk. `before` (B, M, H, W): log decays summed up to the chunk's begin."""
    m, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t = m.to(tl.int64) * Q + tl.arange(0, Q)
    n, p = tl.arange(0, N_BLOCK), tl.arange(0, P_BLOCK)
    mask_Q, mask_N, mask_P = t < length, n < rows, p < columns
    each = 1 if decays > 1 else 0
    before += ((b * chunks + m) * heads + h) * decays
    before_N = tl.load(before + n * each, mask=mask_N, other=float("-inf"))
    y_QP = tl.zeros([Q, P_BLOCK], dtype=tl.float32)
    if tl.max(before_N, axis=0) > cutoff:
        log_decay += (b * length * heads + h) * decays
        C += b * C_strides[0] + (h // (heads // groups)) * C_strides[2]
        log_QN = load_tile(log_decay, t, heads * decays, mask_Q, n, each, mask_N, tl.float32)
        C_QN = load_tile(C, t, C_strides[1], mask_Q, n, 1, mask_N, tl.float32)
        read_QN = C_QN * tl.exp(before_N[None, :] + tl.cumsum(log_QN, axis=0))
        state_NP = load_tile(state + (b * heads + h) * rows * columns, n, columns, mask_N, p, 1, mask_P, DOT)
        y_QP += tl.dot(read_QN.to(DOT), state_NP, input_precision="tf32x3")
    target = y + ((b * length + t) * heads + h)[:, None] * columns + p[None, :]
    tl.store(target, y_QP, mask=mask_Q[:, None] & mask_P[None, :])


@triton.jit
def readout_gradient_kernel(
    state, log_decay, before, C, grad_y, grad_state, grad_sums, grad_C,
    length, heads, groups, rows, columns, decays, chunks, chunks_each, partial_stride, C_strides, grad_strides, cutoff,
    Q: tl.constexpr, N_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of C (added, float32), of the summed log decays, and of the state from `chunks_each` chunks."""
    split, h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n, p = tl.arange(0, N_BLOCK), tl.arange(0, P_BLOCK)
    mask_N, mask_P = n < rows, p < columns
    each = 1 if decays > 1 else 0
    g = h // (heads // groups)
    log_decay += (b * length * heads + h) * decays
    C += b * C_strides[0] + g * C_strides[2]
    grad_y += b * grad_strides[0] + h * grad_strides[2]
    state_PN = load_tile(state + (b * heads + h) * rows * columns, p, 1, mask_P, n, columns, mask_N, DOT)
    grad_state_NP = tl.zeros([N_BLOCK, P_BLOCK], dtype=tl.float32)
    partial = (h % (heads // groups)) * partial_stride
    for i in range(0, chunks_each):
        m = split * chunks_each + i
        at = ((b * chunks + m) * heads + h) * decays
        before_N = tl.load(before + at + n * each, mask=mask_N & (m < chunks), other=float("-inf"))
        if tl.max(before_N, axis=0) > cutoff:
            t = m * Q + tl.arange(0, Q).to(tl.int64)
            mask_Q = t < length
            mask_QN = mask_Q[:, None] & mask_N[None, :]
            grad_QP = load_tile(grad_y, t, grad_strides[1], mask_Q, p, 1, mask_P, DOT)
            log_QN = load_tile(log_decay, t, heads * decays, mask_Q, n, each, mask_N, tl.float32)
            decay_QN = tl.exp(before_N[None, :] + tl.cumsum(log_QN, axis=0))
            C_QN = load_tile(C, t, C_strides[1], mask_Q, n, 1, mask_N, tl.float32)
            grad_C_QN = tl.dot(grad_QP, state_PN, input_precision="tf32x3") * decay_QN
            target = partial + ((b * length + t) * groups + g)[:, None] * rows + n[None, :]
            tl.atomic_add(grad_C + target, grad_C_QN, mask=mask_QN, sem="relaxed")
            grad_sum_QN = grad_C_QN * C_QN
            token = (b * length + t) * heads + h
            if decays > 1:
                tl.store(grad_sums + token[:, None] * decays + n[None, :], grad_sum_QN, mask=mask_QN)
            else:
                tl.store(grad_sums + token, tl.sum(grad_sum_QN, axis=1), mask=mask_Q)
            log_NQ = load_tile(log_decay, n, each, mask_N, t, heads * decays, mask_Q, tl.float32)
            C_NQ = load_tile(C, n, 1, mask_N, t, C_strides[1], mask_Q, tl.float32)
            read_NQ = C_NQ * tl.exp(before_N[:, None] + tl.cumsum(log_NQ, axis=1))
            grad_state_NP += tl.dot(read_NQ.to(DOT), grad_QP, input_precision="tf32x3")
    target = grad_state + ((split * tl.num_programs(2) + b) * heads + h) * rows * columns
    mask_NP = mask_N[:, None] & mask_P[None, :]
    tl.store(target + n[:, None] * columns + p[None, :], grad_state_NP, mask=mask_NP)


@dataclass(frozen=True)
class _Inputs:
    state_BHNP: Tensor
    log_BTHW: Tensor  # float32; minus infinity where a document begins
    before_BMHW: Tensor
    C_BTGN: Tensor
    chunk: int

    @staticmethod
    def prepare(state_BHNP: Tensor, log_BTHW: Tensor, C_BTGN: Tensor, starts_BT: Tensor | None) -> "_Inputs":
        log_BTHW = log_BTHW.float().contiguous()
        if starts_BT is not None:
            log_BTHW = log_BTHW.masked_fill(starts_BT[..., None, None], -torch.inf)
        chunk = 16 if interpreting() else 32 if C_BTGN.dtype == torch.float32 else 64
        padding = -log_BTHW.shape[1] % chunk
        whole_BMHW = F.pad(log_BTHW, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)).sum(2, dtype=torch.float64)
        before_BMHW = F.pad(whole_BMHW, (0, 0, 0, 0, 1, 0))[:, :-1].cumsum(1).float()
        return _Inputs(state_BHNP.contiguous(), log_BTHW, before_BMHW, rows_contiguous(C_BTGN), chunk)

    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """length, heads, groups, rows, columns, decays, chunks: in the order of the kernels' arguments."""
        _, length, groups, rows = self.C_BTGN.shape
        heads, columns = self.state_BHNP.shape[1], self.state_BHNP.shape[3]
        return length, heads, groups, rows, columns, self.log_BTHW.shape[3], self.before_BMHW.shape[1]

    def options(self) -> dict[str, Any]:
        _, _, _, rows, columns, _, _ = self.sizes()
        blocks = {"N_BLOCK": max(16, power_of_two(rows)), "P_BLOCK": max(16, power_of_two(columns))}
        return {"Q": self.chunk, "DOT": dot_type(self.C_BTGN.dtype), "num_warps": 8, "num_stages": 1, **blocks}


class TritonReadout(torch.autograd.Function):
    """y (B, T, H, P) in float32 of state (B, H, N, P), log decays (B, T, H, W) and C (B, T, G, N)."""

    @staticmethod
    def forward(ctx: Any, state_BHNP: Tensor, log_BTHW: Tensor, C_BTGN: Tensor, starts_BT: Tensor | None) -> Tensor:
        inputs = _Inputs.prepare(state_BHNP, log_BTHW, C_BTGN, starts_BT)
        length, heads, _, _, columns, _, chunks = inputs.sizes()
        batch = len(state_BHNP)
        y_BTHP = inputs.state_BHNP.new_empty(batch, length, heads, columns)
        triton_support.launch(
            readout_kernel, (chunks, heads, batch), inputs.state_BHNP, inputs.log_BTHW, inputs.before_BMHW,
            inputs.C_BTGN, y_BTHP, *inputs.sizes(), inputs.C_BTGN.stride()[:3], -negligible_exponent(torch.float32),
            **inputs.options(),
        )  # fmt: skip
        ctx.save_for_backward(state_BHNP, log_BTHW, C_BTGN, starts_BT)
        return y_BTHP

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = rows_contiguous(grads[0])
        state_BHNP, log_BTHW, C_BTGN, starts_BT = ctx.saved_tensors
        inputs = _Inputs.prepare(state_BHNP, log_BTHW, C_BTGN, starts_BT)
        _, heads, groups, _, _, _, chunks = inputs.sizes()
        batch = len(state_BHNP)
        shared = heads // groups
        partials = shared if torch.are_deterministic_algorithms_enabled() else 1
        grad_C = inputs.state_BHNP.new_zeros(partials, *C_BTGN.shape)
        grad_sums_BTHW = torch.zeros_like(inputs.log_BTHW)
        splits = max(1, min(chunks, 8 * triton_support.processors(C_BTGN.device) // (heads * batch)))
        chunks_each = -(-chunks // splits)
        splits = -(-chunks // chunks_each)
        grad_state = inputs.state_BHNP.new_empty(splits, *state_BHNP.shape)
        triton_support.launch(
            readout_gradient_kernel, (splits, heads, batch), inputs.state_BHNP, inputs.log_BTHW, inputs.before_BMHW,
            inputs.C_BTGN, grad_y, grad_state, grad_sums_BTHW, grad_C, *inputs.sizes(), chunks_each,
            grad_C[0].numel() if partials > 1 else 0, inputs.C_BTGN.stride()[:3], grad_y.stride()[:3],
            -negligible_exponent(torch.float32), **inputs.options(),
        )  # fmt: skip
        grad_log = suffix_sums(grad_sums_BTHW)
        return grad_state.sum(0), grad_log.to(log_BTHW.dtype), grad_C.sum(0).to(C_BTGN.dtype), None
