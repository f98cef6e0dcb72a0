"""What a state that enters adds to the outputs of a modal convolution, on a GPU.

y_t = Re sum_n R_n p_n^(t+1) x_n. Segments run in parallel, each from the state at its begin, whose power of the pole is
taken in double precision from its logarithm; one whose slowest mode has left nothing that float32 could show ends at
once, and no token at or after a sequence's first document start counts. All gradients follow from two moments of dy:
sum_t conj(p^(t+1)) dy_t and sum_t (t+1) conj(p^(t+1)) dy_t.

Legend: B batch, T tokens, D channels (of a block inside kernels), N modes per channel, S segments; parts: one of a real
number, two of a complex.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..documents import first_start
from ..living import negligible_exponent
from ..triton_support import batch_strides, interpreting, power_of_two, rows_contiguous
from .triton_modal import joined, planes

__all__ = ["TritonModalReadout"]


@triton.jit
def _power(log_poles, size, offset_ND, mask_ND, tokens, COMPLEX: tl.constexpr):
    """Real and imaginary part of p^tokens, as float32; zero outside."""
    log_re = tl.load(log_poles + offset_ND, mask=mask_ND, other=0.0) * tokens
    decay_ND = tl.where(mask_ND, tl.exp(log_re.to(tl.float32)), 0.0)
    if COMPLEX:  # whole turns are taken off in double precision, so that phases survive a million tokens
        turns_ND = tl.load(log_poles + size + offset_ND, mask=mask_ND, other=0.0) * tokens * 0.15915494309189535
        angle_ND = ((turns_ND - tl.floor(turns_ND)) * 6.283185307179586).to(tl.float32)
        return decay_ND * tl.cos(angle_ND), decay_ND * tl.sin(angle_ND)
    return decay_ND, decay_ND * 0.0


@triton.jit
def _living(log_poles, offset_ND, mask_ND, begin, cutoff):
    """Whether anything of any mode is left at `begin`."""
    slowest_ND = tl.load(log_poles + offset_ND, mask=mask_ND, other=float("-inf"))
    return tl.max(tl.max(slowest_ND, axis=0), axis=0) * begin > cutoff


@triton.jit
def modal_readout_kernel(
    weights, log_poles, reach, y, length, channels, modes, segment, reach_stride, cutoff,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Outputs of a living segment; y is zero before. `weights` (parts, B, N, D): residues times the state."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D = d < channels
    mask_ND = (n < modes)[:, None] & mask_D[None, :]
    offset_ND = n[:, None] * channels + d[None, :]
    size = modes * channels
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, tl.load(reach + b * reach_stride))
    if _living(log_poles, offset_ND, mask_ND, begin, cutoff) & (begin < stop):
        step_re, step_im = _power(log_poles, size, offset_ND, mask_ND, 1, COMPLEX)
        power_re, power_im = _power(log_poles, size, offset_ND, mask_ND, begin, COMPLEX)
        re_ND = tl.load(weights + b * size + offset_ND, mask=mask_ND, other=0.0)
        if COMPLEX:
            part = tl.num_programs(2).to(tl.int64) * size
            im_ND = tl.load(weights + part + b * size + offset_ND, mask=mask_ND, other=0.0)
            next_re = re_ND * power_re - im_ND * power_im
            im_ND = re_ND * power_im + im_ND * power_re
            re_ND = next_re
        else:
            re_ND *= power_re
        for i in range(0, stop - begin):
            t = begin + i  # 64-bit
            if COMPLEX:
                next_re = re_ND * step_re - im_ND * step_im
                im_ND = re_ND * step_im + im_ND * step_re
                re_ND = next_re
            else:
                re_ND *= step_re
            tl.store(y + (b * length + t) * channels + d, tl.sum(re_ND, axis=0), mask=mask_D)


@triton.jit
def modal_moments_kernel(
    grad_y, log_poles, reach, moments, channels, modes, segment, segments, grad_strides, reach_stride, cutoff,
    N_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """A living segment's share of both moments, (2, parts, B, S, N, D); zero before."""
    d = tl.program_id(0) * D_BLOCK + tl.arange(0, D_BLOCK)
    s, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, N_BLOCK)
    mask_D = d < channels
    mask_ND = (n < modes)[:, None] & mask_D[None, :]
    offset_ND = n[:, None] * channels + d[None, :]
    size = modes * channels
    begin = s.to(tl.int64) * segment
    stop = tl.minimum(begin + segment, tl.load(reach + b * reach_stride))
    if _living(log_poles, offset_ND, mask_ND, begin, cutoff) & (begin < stop):
        step_re, step_im = _power(log_poles, size, offset_ND, mask_ND, 1, COMPLEX)
        re_ND, im_ND = _power(log_poles, size, offset_ND, mask_ND, begin, COMPLEX)
        sum_re = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
        sum_im = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
        late_re = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
        late_im = tl.zeros([N_BLOCK, D_BLOCK], dtype=tl.float32)
        grad_y += b * grad_strides[0]
        for i in range(0, stop - begin):
            t = begin + i  # 64-bit
            grad_D = tl.load(grad_y + t * grad_strides[1] + d, mask=mask_D, other=0.0).to(tl.float32)
            next_re = re_ND * step_re - im_ND * step_im
            if COMPLEX:
                im_ND = re_ND * step_im + im_ND * step_re
                sum_im -= im_ND * grad_D[None, :]
                late_im -= im_ND * (grad_D * (t + 1))[None, :]
            re_ND = next_re
            sum_re += re_ND * grad_D[None, :]
            late_re += re_ND * (grad_D * (t + 1))[None, :]
        part = tl.num_programs(2).to(tl.int64) * segments * size
        target = moments + (b * segments + s) * size + offset_ND
        late = (2 if COMPLEX else 1) * part
        tl.store(target, sum_re, mask=mask_ND)
        tl.store(target + late, late_re, mask=mask_ND)
        if COMPLEX:
            tl.store(target + part, sum_im, mask=mask_ND)
            tl.store(target + late + part, late_im, mask=mask_ND)


@dataclass(frozen=True)
class _Plan:
    """Logarithms of the poles (parts, N, D) in double precision, and how the sequence is cut."""

    log_poles: Tensor
    reach: Tensor  # (B or 1, 1) int64: tokens before the first document start
    length: int
    batch: int
    segment: int

    @staticmethod
    def of(log_poles_DN: Tensor, length: int, batch: int, starts_BT: Tensor | None) -> "_Plan":
        if starts_BT is None:
            reach = torch.full((1, 1), length, device=log_poles_DN.device)
        else:
            reach = first_start(starts_BT).unsqueeze(1)
        return _Plan(planes(log_poles_DN, torch.float64), reach, length, batch, 8 if interpreting() else 128)

    @property
    def segments(self) -> int:
        return -(-self.length // self.segment)

    def grid(self) -> tuple[int, int, int]:
        return -(-self.log_poles.shape[2] // self.options()["D_BLOCK"]), self.segments, self.batch

    def options(self) -> dict[str, Any]:
        parts, modes, channels = self.log_poles.shape
        modes = power_of_two(modes)
        block = min(16, power_of_two(channels)) if interpreting() else 32
        return {"N_BLOCK": modes, "D_BLOCK": block, "COMPLEX": parts == 2, "num_warps": max(1, min(8, modes // 16))}

    def sizes(self) -> tuple[int, int, int]:
        """channels, modes, segment: in the order of the kernels' arguments."""
        return self.log_poles.shape[2], self.log_poles.shape[1], self.segment


class TritonModalReadout(torch.autograd.Function):
    """y_t = Re sum_n R_n exp((t+1) log_pole_n) x_n up to each sequence's first document start; y is float32."""

    @staticmethod
    def forward(
        ctx: Any,
        state_BDN: Tensor,
        log_poles_DN: Tensor,
        residues_DN: Tensor,
        length: int,
        starts_BT: Tensor | None,
    ) -> Tensor:
        batch, channels, _ = state_BDN.shape
        plan = _Plan.of(log_poles_DN, length, batch, starts_BT)
        y_BTD = torch.zeros(batch, length, channels, dtype=torch.float32, device=state_BDN.device)
        triton_support.launch(
            modal_readout_kernel, plan.grid(), planes(state_BDN * residues_DN, torch.float32), plan.log_poles,
            plan.reach, y_BTD, length, *plan.sizes(), batch_strides(plan.reach)[0],
            -negligible_exponent(torch.float32), **plan.options(),
        )  # fmt: skip
        ctx.save_for_backward(state_BDN, log_poles_DN, residues_DN, starts_BT)
        ctx.length = length
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = rows_contiguous(grads[0])
        state_BDN, log_poles_DN, residues_DN, starts_BT = ctx.saved_tensors
        batch = len(state_BDN)
        plan = _Plan.of(log_poles_DN, ctx.length, batch, starts_BT)
        parts, modes, channels = plan.log_poles.shape
        moments = grad_y.new_zeros(2, parts, batch, plan.segments, modes, channels, dtype=torch.float32)
        triton_support.launch(
            modal_moments_kernel, plan.grid(), grad_y, plan.log_poles, plan.reach, moments, *plan.sizes(),
            plan.segments, batch_strides(grad_y), batch_strides(plan.reach)[0], -negligible_exponent(torch.float32),
            **plan.options(),
        )  # fmt: skip
        plain_BDN, late_BDN = (joined(x, parts == 2) for x in moments.sum(3))
        grad_state = residues_DN.conj() * plain_BDN
        grad_poles = ((state_BDN * residues_DN).conj() * late_BDN).sum(0)
        grad_residues = (state_BDN.conj() * plain_BDN).sum(0)
        return (
            grad_state.to(state_BDN.dtype), grad_poles.to(log_poles_DN.dtype), grad_residues.to(residues_DN.dtype),
            None, None,
        )  # fmt: skip
