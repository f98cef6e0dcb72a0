"""What a state that enters adds to the outputs of a selective scan, on a GPU. Takes the place of readout.Enter.

y_t += sum_n C_t[n] exp(A[n] c_t) state[n], with c_t the step sizes summed up to token t: nothing is carried from token
to token but that sum. Segments run in parallel, from the sums before them, which the scan has left; one whose decays
have left nothing that float32 could show ends at once, and no token at or after a sequence's first document start
counts.

Legend: B batch, T tokens, D channels (of a block inside kernels), N states per channel, S segments, K kept states.
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
from ..living import negligible_exponent
from ..triton_math import load_rows
from ..triton_support import batch_strides, interpreting, power_of_two, rows_contiguous
from .triton_forward import tile_steps
from .triton_scan import kept_every, tokens_reached


@triton.jit
def scan_enter_kernel(
    state, delta, A_log2, C, bias, before, reach, y, length, channels, states, checks, check,
    delta_strides, C_strides, reach_stride, cutoff,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr, CHECKS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Adds to the outputs of a living segment, CHECKS x `check` tokens. `before` (B, K, D): sums up to every check."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D, mask_N = d < channels, n < states
    mask_ND = mask_N[:, None] & mask_D[None, :]
    offset_ND = n[:, None] * channels + d[None, :]
    begin = s.to(tl.int64) * CHECKS * check
    stop = tl.minimum(begin + CHECKS * check, tl.minimum(length, tl.load(reach + b * reach_stride)))
    sum_D = tl.load(before + (b * checks + s * CHECKS) * channels + d, mask=mask_D, other=0.0)
    A_ND = tl.load(A_log2 + offset_ND, mask=mask_ND, other=0.0)
    living = tl.max(tl.max(tl.where(mask_ND, A_ND * sum_D[None, :], float("-inf")), axis=0), axis=0) > cutoff
    if living & (begin < stop):
        bias_D = tl.zeros([D_BLOCK], dtype=tl.float32)
        if bias is not None:
            bias_D += tl.load(bias + d, mask=mask_D, other=0.0)
        state_ND = tl.load(state + b * states * channels + offset_ND, mask=mask_ND, other=0.0)
        delta += b * delta_strides[0]
        C += b * C_strides[0]
        y += b * length * channels
        for i in range(0, tl.cdiv(CHECKS * check, TILE)):
            first = begin + i * TILE
            raws = load_rows(delta, delta_strides[1], first, stop, d, mask_D, TILE)
            steps = tile_steps(raws, bias_D, first, stop, mask_D, TILE, SOFTPLUS)
            Cs = load_rows(C, C_strides[1], first, stop, n, mask_N, TILE)
            ys = load_rows(y, channels, first, stop, d, mask_D, TILE)
            for j in tl.static_range(TILE):
                sum_D += steps[j]
                y_D = ys[j] + tl.sum(tl.exp2(A_ND * sum_D[None, :]) * state_ND * Cs[j][:, None], axis=0)
                target = y + (first + j) * channels + d
                tl.store(target, y_D.to(y.dtype.element_ty), mask=mask_D & (first + j < stop))


@triton.jit
def scan_enter_gradient_kernel(
    grad_state, delta, A_log2, C, bias, before, reach, grad_y, length, channels, states, checks, check, segments,
    delta_strides, C_strides, grad_strides, reach_stride, cutoff,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, TILE: tl.constexpr, CHECKS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Gradient of the state, one partial sum per segment; zero before, and left so by a segment that does not live."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D, mask_N = d < channels, n < states
    mask_ND = mask_N[:, None] & mask_D[None, :]
    offset_ND = n[:, None] * channels + d[None, :]
    begin = s.to(tl.int64) * CHECKS * check
    stop = tl.minimum(begin + CHECKS * check, tl.minimum(length, tl.load(reach + b * reach_stride)))
    sum_D = tl.load(before + (b * checks + s * CHECKS) * channels + d, mask=mask_D, other=0.0)
    A_ND = tl.load(A_log2 + offset_ND, mask=mask_ND, other=0.0)
    living = tl.max(tl.max(tl.where(mask_ND, A_ND * sum_D[None, :], float("-inf")), axis=0), axis=0) > cutoff
    if living & (begin < stop):
        bias_D = tl.zeros([D_BLOCK], dtype=tl.float32)
        if bias is not None:
            bias_D += tl.load(bias + d, mask=mask_D, other=0.0)
        delta += b * delta_strides[0]
        C += b * C_strides[0]
        grad_y += b * grad_strides[0]
        grad_state_ND = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
        for i in range(0, tl.cdiv(CHECKS * check, TILE)):
            first = begin + i * TILE
            raws = load_rows(delta, delta_strides[1], first, stop, d, mask_D, TILE)
            steps = tile_steps(raws, bias_D, first, stop, mask_D, TILE, SOFTPLUS)
            Cs = load_rows(C, C_strides[1], first, stop, n, mask_N, TILE)
            grads = load_rows(grad_y, grad_strides[1], first, stop, d, mask_D, TILE)
            for j in tl.static_range(TILE):
                sum_D += steps[j]
                grad_state_ND += tl.exp2(A_ND * sum_D[None, :]) * grads[j][None, :] * Cs[j][:, None]
        row = (b * segments + s) * states * channels
        tl.store(grad_state + row + offset_ND, grad_state_ND, mask=mask_ND)


@dataclass(frozen=True)
class _Inputs:
    """What both kernels read, and how they are launched."""

    delta_BTD: Tensor
    A_log2_ND: Tensor
    C_BTN: Tensor
    bias: Tensor | None
    before_BKD: Tensor
    reach: Tensor
    softplus: bool

    @staticmethod
    def prepare(
        delta_BTD: Tensor, A_DN: Tensor, C_BTN: Tensor, bias: Tensor | None, starts_BT: Tensor | None,
        before_BKD: Tensor, softplus: bool,
    ) -> "_Inputs":  # fmt: skip
        A_log2_ND = (A_DN.t() * math.log2(math.e)).contiguous()
        reach = tokens_reached(starts_BT, delta_BTD)
        return _Inputs(rows_contiguous(delta_BTD), A_log2_ND, rows_contiguous(C_BTN), bias, before_BKD, reach, softplus)

    @property
    def checks(self) -> int:
        """Kept states of a segment: few segments, as each has a partial sum of its own in the backward."""
        return 2 if interpreting() else 4

    @property
    def segments(self) -> int:
        return -(-self.before_BKD.shape[1] // self.checks)

    def grid(self) -> tuple[int, int, int]:
        batch, _, channels = self.delta_BTD.shape
        return -(-channels // self.options()["D_BLOCK"]), self.segments, batch

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.delta_BTD, self.A_log2_ND, self.C_BTN, self.bias, self.before_BKD, self.reach

    def sizes(self) -> tuple[int, int, int, int, int]:
        """length, channels, states, checks, check: in the order of the kernels' arguments."""
        _, length, channels = self.delta_BTD.shape
        return length, channels, self.A_log2_ND.shape[0], self.before_BKD.shape[1], kept_every()

    def strides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return batch_strides(self.delta_BTD), batch_strides(self.C_BTN)

    def options(self) -> dict[str, int | bool]:
        states, more = power_of_two(self.A_log2_ND.shape[0]), {"CHECKS": self.checks, "SOFTPLUS": self.softplus}
        if interpreting():
            return {"N_BLOCK": states, "D_BLOCK": min(16, power_of_two(self.delta_BTD.shape[2])), "TILE": 2, **more}
        return {"N_BLOCK": states, "D_BLOCK": 32, "TILE": 2, "num_warps": max(1, min(8, states // 16)), **more}

    def cutoff(self) -> float:
        return -negligible_exponent(torch.float32) * math.log2(math.e)


class TritonEnter(torch.autograd.Function):
    """See readout.Enter; state and A are float32."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        entering_BDN: Tensor,
        delta_BTD: Tensor,
        A_DN: Tensor,
        C_BTN: Tensor,
        delta_bias: Tensor | None,
        starts_BT: Tensor | None,
        before_BKD: Tensor,
        softplus: bool,
    ) -> Tensor:
        inputs = _Inputs.prepare(delta_BTD, A_DN, C_BTN, delta_bias, starts_BT, before_BKD, softplus)
        triton_support.launch(
            scan_enter_kernel, inputs.grid(), entering_BDN.transpose(1, 2).contiguous(), *inputs.tensors(), y_BTD,
            *inputs.sizes(), *inputs.strides(), batch_strides(inputs.reach)[0], inputs.cutoff(), **inputs.options(),
        )  # fmt: skip
        ctx.save_for_backward(delta_BTD, A_DN, C_BTN, delta_bias, starts_BT, before_BKD)
        ctx.softplus = softplus
        ctx.mark_dirty(y_BTD)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        delta_BTD, A_DN, C_BTN, delta_bias, starts_BT, before_BKD = ctx.saved_tensors
        inputs = _Inputs.prepare(delta_BTD, A_DN, C_BTN, delta_bias, starts_BT, before_BKD, ctx.softplus)
        grad_y_BTD = rows_contiguous(grads[0])
        batch, _, channels = inputs.delta_BTD.shape
        states = len(inputs.A_log2_ND)
        grad_BSND = inputs.A_log2_ND.new_zeros(batch, inputs.segments, states, channels)
        triton_support.launch(
            scan_enter_gradient_kernel, inputs.grid(), grad_BSND, *inputs.tensors(), grad_y_BTD, *inputs.sizes(),
            inputs.segments, *inputs.strides(), batch_strides(grad_y_BTD), batch_strides(inputs.reach)[0],
            inputs.cutoff(), **inputs.options(),
        )  # fmt: skip
        return grads[0], grad_BSND.sum(1).transpose(1, 2), *(None,) * 7
