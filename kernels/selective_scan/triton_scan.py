"""Selective scan on a GPU. Takes the place of portable.SelectiveScan, argument for argument.

The sequence is cut into segments so that channels x segments fill the machine:
1. `summary_kernel`: the state each segment leaves, and the sum of its step sizes (exp(A sum) is what it keeps);
2. `pass_kernel`: the true state that enters each segment, in order (small);
3. `scan_kernel`: outputs, with the true states; one state kept for every CHECK tokens.
Where batch and channels alone fill the machine there is one segment and only the third step. The backward mirrors this
with adjoint states; `backward_kernel` recomputes the states from the kept ones, a few tokens at a time in registers.
Gradients of B and C are summed over a block of channels before one atomic addition, or, if PyTorch is asked for
deterministic algorithms, before one store to a buffer per block.

Legend: B batch, T tokens, D channels, N states per channel, S segments.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..documents import first_start
from ..triton_support import as_bytes, batch_strides, interpreting, power_of_two, processors, rows_contiguous
from .stages import Entering
from .triton_backward import backward_kernel
from .triton_forward import pass_kernel, scan_kernel, summary_kernel


def kept_every() -> int:
    """Tokens between kept states."""
    return 4 if interpreting() else 64


@dataclass(frozen=True)
class ScanPlan:
    """Sizes of a launch, in tokens and channels."""

    segment: int  # tokens of a program, a multiple of `check`
    segments: int
    channel_block: int
    state_block: int
    check: int  # tokens between kept states
    tile: int  # tokens held in registers
    warps: int

    @staticmethod
    def choose(batch: int, length: int, channels: int, states: int, device: torch.device) -> "ScanPlan":
        """Programs of one warp, a lane per channel, enough of them to hide each other's latency."""
        state_block = power_of_two(states)
        if interpreting():
            return ScanPlan(8, -(-length // 8), min(16, power_of_two(channels)), state_block, kept_every(), 2, 1)
        channel_block = min(32, max(16, power_of_two(channels))) if state_block < 256 else 16
        check, tile = kept_every(), 2 if state_block <= 16 else 1
        warps = max(1, min(8, state_block // 16))  # about sixteen states a lane: the backward then fits in registers
        wanted = 32 * processors(device)
        segments = -(-wanted // max(batch * -(-channels // channel_block), 1))
        segments = max(1, min(segments, length // 256))
        segment = -(-length // (segments * check)) * check
        return ScanPlan(segment, -(-length // segment), channel_block, state_block, check, tile, warps)

    def blocks(self, channels: int) -> int:
        return -(-channels // self.channel_block)

    def options(self) -> dict[str, int]:
        return {"N_BLOCK": self.state_block, "D_BLOCK": self.channel_block, "num_warps": self.warps}


@dataclass(frozen=True)
class _Inputs:
    """Tensors as kernels read them: last dimension dense, A as (N, D) times log2(e), masks as bytes."""

    u_BTD: Tensor
    delta_BTD: Tensor
    A_log2_ND: Tensor
    B_BTN: Tensor
    C_BTN: Tensor
    D: Tensor | None
    z_BTD: Tensor | None
    delta_bias: Tensor | None
    starts_BT: Tensor | None
    softplus: bool
    plan: ScanPlan

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        batch, length, channels = self.u_BTD.shape
        return batch, length, channels, self.A_log2_ND.shape[0]

    def strides(self) -> tuple[tuple[int, int], ...]:
        return tuple(batch_strides(x) for x in (self.u_BTD, self.delta_BTD, self.B_BTN, self.C_BTN, self.z_BTD))

    def starts_stride(self) -> int:
        return batch_strides(self.starts_BT)[0]

    def entering(self, outermost_BND: Tensor, grad_y_BTD: Tensor | None = None) -> Tensor:
        """(B, S, N, D): the state that enters each segment or, given a gradient, the adjoint that does."""
        batch, length, channels, states = self.sizes
        segments, options = self.plan.segments, self.plan.options()
        if segments == 1:
            return outermost_BND.contiguous()
        empty = outermost_BND.new_empty
        ends_BSND, sums_BSD = empty(batch, segments, states, channels), empty(batch, segments, channels)
        alive_BS = empty(batch, segments)
        reverse = grad_y_BTD is not None
        # The last segment's end (in reverse: the first one's beginning) enters nothing.
        triton_support.launch(
            summary_kernel, (self.plan.blocks(channels), segments - 1, batch),
            self.u_BTD, self.delta_BTD, self.A_log2_ND, self.B_BTN, self.C_BTN, self.z_BTD, self.delta_bias,
            self.starts_BT, grad_y_BTD, ends_BSND, sums_BSD, alive_BS, length, channels, states, self.plan.segment,
            int(reverse), segments, *self.strides(), batch_strides(grad_y_BTD), self.starts_stride(),
            TILE=self.plan.tile, SOFTPLUS=self.softplus, REVERSE=reverse, **options,
        )  # fmt: skip
        carried_BSND = torch.empty_like(ends_BSND)
        triton_support.launch(
            pass_kernel, (self.plan.blocks(channels), batch), self.A_log2_ND, ends_BSND, sums_BSD, alive_BS,
            carried_BSND, outermost_BND.contiguous(), channels, states, segments, REVERSE=reverse, **options,
        )  # fmt: skip
        return carried_BSND


class TritonSelectiveScan(torch.autograd.Function):
    """The scan in Triton kernels; call it through `selective_scan`, which checks and prepares the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        u_BTD: Tensor,
        delta_BTD: Tensor,
        A_DN: Tensor,
        B_BTN: Tensor,
        C_BTN: Tensor,
        D: Tensor | None,
        z_BTD: Tensor | None,
        delta_bias: Tensor | None,
        initial_BDN: Tensor,
        starts_BT: Tensor | None,
        softplus: bool,
        entering: Entering | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = u_BTD.shape
        states = A_DN.shape[1]
        plan = ScanPlan.choose(batch, length, channels, states, u_BTD.device)
        u_BTD, delta_BTD, B_BTN, C_BTN = (rows_contiguous(x) for x in (u_BTD, delta_BTD, B_BTN, C_BTN))
        z_BTD = None if z_BTD is None else rows_contiguous(z_BTD)
        A_log2_ND = (A_DN.t() * math.log2(math.e)).contiguous()
        inputs = _Inputs(
            u_BTD, delta_BTD, A_log2_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, as_bytes(starts_BT), softplus, plan
        )
        carried = inputs.entering(initial_BDN.transpose(1, 2))
        checks = -(-length // plan.check)
        checkpoints = initial_BDN.new_empty(batch, checks, states, channels)
        sums_BKD = None if entering is None else initial_BDN.new_empty(batch, checks, channels)
        y_BTD = torch.empty(batch, length, channels, dtype=u_BTD.dtype, device=u_BTD.device)
        final_BND = initial_BDN.new_empty(batch, states, channels)
        triton_support.launch(
            scan_kernel, (plan.blocks(channels), plan.segments, batch),
            u_BTD, delta_BTD, A_log2_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, inputs.starts_BT, carried, checkpoints,
            sums_BKD, y_BTD, final_BND, length, channels, states, plan.segment, plan.segments, *inputs.strides(),
            inputs.starts_stride(), CHECK=plan.check, TILE=plan.tile, SOFTPLUS=softplus, **plan.options(),
        )  # fmt: skip
        saved = (u_BTD, delta_BTD, A_log2_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, inputs.starts_BT)
        before_BKD = None if entering is None or sums_BKD is None else entering.note(sums_BKD)
        ctx.save_for_backward(*saved, checkpoints, before_BKD)
        ctx.softplus, ctx.plan, ctx.entering = softplus, plan, entering
        return y_BTD, final_BND.transpose(1, 2).contiguous()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y_BTD, grad_final_BDN = rows_contiguous(grads[0]), grads[1]
        *saved, checkpoints, before_BKD = ctx.saved_tensors
        plan: ScanPlan = ctx.plan
        u_BTD, delta_BTD, A_log2_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, starts_BT = saved
        inputs = _Inputs(u_BTD, delta_BTD, A_log2_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, starts_BT, ctx.softplus, plan)
        batch, length, channels, states = inputs.sizes
        adjoints = inputs.entering(grad_final_BDN.transpose(1, 2), grad_y_BTD)
        state_BND = reach = None
        if ctx.entering is not None and ctx.entering.state_BDN is not None:
            state_BND, reach = ctx.entering.state_BDN.transpose(1, 2).contiguous(), tokens_reached(starts_BT, u_BTD)
        blocks = plan.blocks(channels)
        partials = blocks if torch.are_deterministic_algorithms_enabled() else 1
        grad_B, grad_C = checkpoints.new_zeros(2, partials, batch, length, states).unbind(0)
        grad_u, grad_delta, grad_z = (
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (inputs.u_BTD, inputs.delta_BTD, inputs.z_BTD)
        )
        per_segment = (batch, plan.segments, channels)
        grad_A = checkpoints.new_empty(batch, plan.segments, states, channels)
        grad_D, grad_bias = (
            None if x is None else checkpoints.new_empty(per_segment) for x in (inputs.D, inputs.delta_bias)
        )
        grad_initial_BND = checkpoints.new_empty(batch, states, channels)
        scratch = checkpoints.new_empty(
            batch * plan.segments * blocks, plan.check // plan.tile, plan.state_block, plan.channel_block
        )
        triton_support.launch(
            backward_kernel, (blocks, plan.segments, batch), *saved, grad_y_BTD, checkpoints,
            before_BKD, state_BND, reach, adjoints, scratch,
            grad_u, grad_delta, grad_B, grad_C, grad_z, grad_A, grad_D, grad_bias, grad_initial_BND,
            length, channels, states, plan.segment, plan.segments, batch * length * states if partials > 1 else 0,
            *inputs.strides(), batch_strides(grad_y_BTD), inputs.starts_stride(), batch_strides(reach)[0],
            CHECK=plan.check, TILE=plan.tile, SOFTPLUS=ctx.softplus, **plan.options(),
        )  # fmt: skip
        return (
            grad_u, grad_delta, grad_A.sum((0, 1)).t(), grad_B.sum(0).to(inputs.B_BTN.dtype),
            grad_C.sum(0).to(inputs.C_BTN.dtype), None if grad_D is None else grad_D.sum((0, 1)), grad_z,
            None if grad_bias is None else grad_bias.sum((0, 1)), grad_initial_BND.transpose(1, 2), None, None,
            None,
        )  # fmt: skip


def tokens_reached(starts_BT: Tensor | None, like_BTD: Tensor) -> Tensor:
    """(B or 1, 1) int64: tokens before the first document start."""
    if starts_BT is None:
        return torch.full((1, 1), like_BTD.shape[1], device=like_BTD.device)
    return first_start(starts_BT.bool()).unsqueeze(1)
