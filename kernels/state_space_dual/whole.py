"""The state-space dual of a sequence that is on one process: all three steps of a few chunks, then those of the next.

The forward keeps the state at the begin of each piece; the backward makes the others again.

Legend: as in portable.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order, own_precision
from . import portable
from .pieces import Plan


class Whole(torch.autograd.Function):
    """(y_BTHP in the dtype of x, the state after the last token); see `state_space_dual`."""

    @staticmethod
    @own_precision
    def forward(
        ctx: Any, plan: Plan, x_BTHP: Tensor, sums_BMQH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, state_BHPN: Tensor
    ) -> tuple[Tensor, Tensor]:
        y_BTHP, boundaries = torch.empty(x_BTHP.shape, dtype=x_BTHP.dtype, device=x_BTHP.device), []
        for piece in plan.paired:
            boundaries.append(state_BHPN)
            x, B, C = (plan.cut(tensor, piece) for tensor in (x_BTHP, B_BTGN, C_BTGN))
            decays = plan.decays(sums_BMQH, piece)
            entering, state_BHPN = portable.pass_states(state_BHPN, portable.states(x, B, decays), decays.whole_BMH)
            y = torch.addcmul(portable.local(x, B, C, decays), portable.readout(entering, C), decays.since_BMQH1)
            y_BTHP[:, piece.tokens].unflatten(1, (-1, piece.chunk)).copy_(y)
        ctx.plan = plan
        ctx.save_for_backward(x_BTHP, sums_BMQH, B_BTGN, C_BTGN, *boundaries)
        return y_BTHP, state_BHPN.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, adjoint = grads
        plan: Plan = ctx.plan
        x_BTHP, sums_BMQH, B_BTGN, C_BTGN, *boundaries = ctx.saved_tensors
        tensors = x_BTHP, B_BTGN, C_BTGN
        grad_x, grad_B, grad_C = (torch.empty(of.shape, dtype=of.dtype, device=of.device) for of in tensors)
        grad_sums = torch.zeros_like(sums_BMQH)
        for piece, state in zip(reversed(plan.paired), reversed(boundaries), strict=True):
            dy, x, B, C = (plan.cut(tensor, piece) for tensor in (grad_y, *tensors))
            decays = plan.decays(sums_BMQH, piece)
            entering, _ = portable.pass_states(state, portable.states(x, B, decays), decays.whole_BMH)
            dentering, dC, dsums = portable.readout_backward(dy, entering, C, decays)
            dadded, adjoint, dwhole = portable.pass_backward(adjoint, dentering, entering, decays)
            dsums[:, :, -1] += dwhole
            local_dx, local_dB, local_dC, local_dsums = portable.local_backward(dy, x, B, C, decays)
            dx, dB, states_dsums = portable.states_backward(dadded, x, B, decays)
            parts = (grad_x, dx, local_dx), (grad_B, dB, local_dB), (grad_C, dC, local_dC)
            for whole, first, second in parts:
                whole[:, piece.tokens].unflatten(1, (-1, piece.chunk)).copy_(first.add_(second))
            grad_sums[:, piece.chunks, : piece.chunk] = dsums.add_(local_dsums).add_(states_dsums)
        return None, grad_x, grad_sums, grad_B, grad_C, adjoint
