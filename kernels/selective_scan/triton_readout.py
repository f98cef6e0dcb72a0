"""What a state that enters adds to the outputs of a selective scan, on a GPU. Takes the place of readout.Readout.

y_t = sum_n C_t[n] exp(A[n] c_t) state[n], with c_t the step sizes summed up to token t: nothing is carried from token
to token but that sum. Segments run in parallel, from the sums before them; one whose decays have left nothing that
float32 could show ends at once, and no token at or after a sequence's first document start counts.

Legend: B batch, T tokens, D channels (of a block inside kernels), N states per channel, S segments.
"""

# The type checker takes triton.language.static_range for something that cannot be iterated.
# pyright: reportGeneralTypeIssues=false

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..documents import first_start
from ..living import negligible_exponent, suffix_sums
from ..triton_math import load_rows
from ..triton_support import batch_strides, interpreting, power_of_two, rows_contiguous


@triton.jit
def scan_readout_kernel(
    state, delta, A_log2, C, before, reach, y, length, channels, states, segment, segments,
    delta_strides, C_strides, reach_stride, cutoff,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Outputs of a living segment; y is zero before. `before` (B, S, D): step sizes summed up to its begin."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D, mask_N = d < channels, n < states
    mask_ND = mask_N[:, None] & mask_D[None, :]
    offset_ND = n[:, None] * channels + d[None, :]
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, tl.load(reach + b * reach_stride))
    sum_D = tl.load(before + (b * segments + s) * channels + d, mask=mask_D, other=0.0)
    A_ND = tl.load(A_log2 + offset_ND, mask=mask_ND, other=0.0)
    living = tl.max(tl.max(tl.where(mask_ND, A_ND * sum_D[None, :], float("-inf")), axis=0), axis=0) > cutoff
    if living & (begin < stop):
        state_ND = tl.load(state + b * states * channels + offset_ND, mask=mask_ND, other=0.0)
        delta += b * delta_strides[0]
        C += b * C_strides[0]
        for i in range(0, tl.cdiv(segment, TILE)):
            first = begin + i * TILE
            steps = load_rows(delta, delta_strides[1], first, stop, d, mask_D, TILE)
            Cs = load_rows(C, C_strides[1], first, stop, n, mask_N, TILE)
            for j in tl.static_range(TILE):
                sum_D += steps[j]
                y_D = tl.sum(tl.exp2(A_ND * sum_D[None, :]) * state_ND * Cs[j][:, None], axis=0)
                target = y + (b * length + first + j) * channels + d
                tl.store(target, y_D.to(y.dtype.element_ty), mask=mask_D & (first + j < stop))


@triton.jit
def scan_readout_gradient_kernel(
    state, delta, A_log2, C, before, reach, grad_y, grad_state, grad_sums, grad_A, grad_C,
    length, channels, states, segment, segments, partial_stride,
    delta_strides, C_strides, grad_strides, reach_stride, cutoff,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of state and A (one partial sum per segment), of C (added, float32) and of the summed step sizes.

    All are zero before; a segment that does not live leaves them.
    """
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D, mask_N = d < channels, n < states
    mask_ND = mask_N[:, None] & mask_D[None, :]
    offset_ND = n[:, None] * channels + d[None, :]
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, tl.load(reach + b * reach_stride))
    row = b * segments + s
    sum_D = tl.load(before + row * channels + d, mask=mask_D, other=0.0)
    A_ND = tl.load(A_log2 + offset_ND, mask=mask_ND, other=0.0)
    living = tl.max(tl.max(tl.where(mask_ND, A_ND * sum_D[None, :], float("-inf")), axis=0), axis=0) > cutoff
    if living & (begin < stop):
        state_ND = tl.load(state + b * states * channels + offset_ND, mask=mask_ND, other=0.0)
        delta += b * delta_strides[0]
        C += b * C_strides[0]
        grad_y += b * grad_strides[0]
        grad_C += tl.program_id(0).to(tl.int64) * partial_stride + b * length * states
        grad_state_ND = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
        grad_A_ND = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
        for i in range(0, tl.cdiv(segment, TILE)):
            first = begin + i * TILE
            steps = load_rows(delta, delta_strides[1], first, stop, d, mask_D, TILE)
            Cs = load_rows(C, C_strides[1], first, stop, n, mask_N, TILE)
            grads = load_rows(grad_y, grad_strides[1], first, stop, d, mask_D, TILE)
            for j in tl.static_range(TILE):
                sum_D += steps[j]
                here = first + j < stop
                term_ND = tl.exp2(A_ND * sum_D[None, :]) * grads[j][None, :]
                grad_C_N = tl.sum(term_ND * state_ND, axis=1)
                tl.atomic_add(grad_C + (first + j) * states + n, grad_C_N, mask=mask_N & here, sem="relaxed")
                term_ND *= Cs[j][:, None]
                grad_state_ND += term_ND
                moment_ND = term_ND * state_ND
                grad_A_ND += moment_ND * sum_D[None, :]
                # A_log2 = A log2(e), so A is ln(2) times it
                grad_sum_D = 0.6931471805599453 * tl.sum(moment_ND * A_ND, axis=0)
                tl.store(grad_sums + (b * length + first + j) * channels + d, grad_sum_D, mask=mask_D & here)
        tl.store(grad_state + row * states * channels + offset_ND, grad_state_ND, mask=mask_ND)
        tl.store(grad_A + row * states * channels + offset_ND, grad_A_ND, mask=mask_ND)


@dataclass(frozen=True)
class _Inputs:
    state_BND: Tensor
    delta_BTD: Tensor
    A_log2_ND: Tensor
    C_BTN: Tensor
    before_BSD: Tensor
    reach: Tensor  # (B or 1, 1) int64: tokens before the first document start
    segment: int

    @staticmethod
    def prepare(
        state_BDN: Tensor, delta_BTD: Tensor, A_DN: Tensor, C_BTN: Tensor, starts_BT: Tensor | None
    ) -> "_Inputs":
        batch, length, channels = delta_BTD.shape
        segment = 8 if interpreting() else 128
        whole = length // segment
        sums_BSD = delta_BTD[:, : whole * segment].unflatten(1, (whole, segment)).sum(2, dtype=torch.float32)
        nothing_B1D = sums_BSD.new_zeros(batch, 1, channels)
        before_BSD = torch.cat((nothing_B1D, sums_BSD.cumsum(1)), 1)[:, : -(-length // segment)].contiguous()
        if starts_BT is None:
            reach = torch.full((1, 1), length, device=delta_BTD.device)
        else:
            reach = first_start(starts_BT).unsqueeze(1)
        return _Inputs(
            state_BDN.transpose(1, 2).contiguous(), rows_contiguous(delta_BTD),
            (A_DN.t() * math.log2(math.e)).contiguous(), rows_contiguous(C_BTN), before_BSD, reach, segment,
        )  # fmt: skip

    def tensors(self) -> tuple[Tensor, ...]:
        return self.state_BND, self.delta_BTD, self.A_log2_ND, self.C_BTN, self.before_BSD, self.reach

    def sizes(self) -> tuple[int, int, int, int, int]:
        """length, channels, states, segment, segments: in the order of the kernels' arguments."""
        _, length, channels = self.delta_BTD.shape
        return length, channels, self.state_BND.shape[1], self.segment, self.before_BSD.shape[1]

    def grid(self) -> tuple[int, int, int]:
        channels, block = self.delta_BTD.shape[2], self.options()["D_BLOCK"]
        return -(-channels // block), self.before_BSD.shape[1], len(self.delta_BTD)

    def options(self) -> dict[str, int]:
        states = power_of_two(self.state_BND.shape[1])
        if interpreting():
            return {"N_BLOCK": states, "D_BLOCK": min(16, power_of_two(self.delta_BTD.shape[2])), "TILE": 2}
        return {"N_BLOCK": states, "D_BLOCK": 32, "TILE": 2, "num_warps": max(1, min(8, states // 16))}

    def strides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return batch_strides(self.delta_BTD), batch_strides(self.C_BTN)

    def cutoff(self) -> float:
        return -negligible_exponent(torch.float32) * math.log2(math.e)


class TritonReadout(torch.autograd.Function):
    """See `selective_scan_readout`; state and A are float32."""

    @staticmethod
    def forward(
        ctx: Any, state_BDN: Tensor, delta_BTD: Tensor, A_DN: Tensor, C_BTN: Tensor, starts_BT: Tensor | None
    ) -> Tensor:
        inputs = _Inputs.prepare(state_BDN, delta_BTD, A_DN, C_BTN, starts_BT)
        y_BTD = torch.zeros(delta_BTD.shape, dtype=delta_BTD.dtype, device=delta_BTD.device)
        triton_support.launch(
            scan_readout_kernel, inputs.grid(), *inputs.tensors(), y_BTD, *inputs.sizes(), *inputs.strides(),
            batch_strides(inputs.reach)[0], inputs.cutoff(), **inputs.options(),
        )  # fmt: skip
        ctx.save_for_backward(state_BDN, delta_BTD, A_DN, C_BTN, starts_BT)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = rows_contiguous(grads[0])
        state_BDN, delta_BTD, A_DN, C_BTN, starts_BT = ctx.saved_tensors
        inputs = _Inputs.prepare(state_BDN, delta_BTD, A_DN, C_BTN, starts_BT)
        blocks, segments, batch = inputs.grid()
        zeros = inputs.state_BND.new_zeros
        grad_state, grad_A = zeros(2, batch, segments, *inputs.state_BND.shape[1:]).unbind(0)
        grad_sums_BTD = zeros(delta_BTD.shape)
        partials = blocks if torch.are_deterministic_algorithms_enabled() else 1
        grad_C = zeros(partials, *C_BTN.shape)
        triton_support.launch(
            scan_readout_gradient_kernel, inputs.grid(), *inputs.tensors(), grad_y, grad_state, grad_sums_BTD, grad_A,
            grad_C, *inputs.sizes(), grad_C[0].numel() if partials > 1 else 0, *inputs.strides(),
            batch_strides(grad_y), batch_strides(inputs.reach)[0], inputs.cutoff(), **inputs.options(),
        )  # fmt: skip
        grad_delta = suffix_sums(grad_sums_BTD)
        return (
            grad_state.sum(1).transpose(1, 2), grad_delta.to(delta_BTD.dtype), grad_A.sum((0, 1)).t(),
            grad_C.sum(0).to(C_BTN.dtype), None,
        )  # fmt: skip
