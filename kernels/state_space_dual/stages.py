"""The state-space dual in three stages, so that a split sequence's states travel while its outputs are computed.

First what every chunk adds to the state, and so the state that leaves; then what each chunk's own tokens give its
outputs, most of the work; last, with the state that enters, what the states before the chunks give them. The backward
pass goes through them in reverse: after the first of its stages it has the gradient of the entering state, and only the
last needs that of the leaving one.

Between the stages lie the outputs and one state for each chunk, nothing bigger. For slots see kernels/stages.py.

Legend: as in portable.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order, own_precision
from ..stages import slot
from . import portable
from .pieces import Plan, sums_of_chunks


class States(torch.autograd.Function):
    """(what each chunk adds (B, M, H, P, N), the state that leaves (B, H, P, N), slots of x and of B)."""

    @staticmethod
    @own_precision
    def forward(ctx: Any, plan: Plan, x_BTHP: Tensor, sums_BMQH: Tensor, B_BTGN: Tensor) -> tuple[Tensor, ...]:
        (batch, _, heads, width), states = x_BTHP.shape, B_BTGN.shape[3]
        added = x_BTHP.new_empty(batch, sums_BMQH.shape[1], heads, width, states, dtype=plan.dtype)
        leaving = added.new_zeros(batch, heads, width, states)
        tail_BMH11 = plan.tails(sums_BMQH)[..., None, None]
        for piece in plan.unpaired:
            x, B, decays = plan.cut(x_BTHP, piece), plan.cut(B_BTGN, piece), plan.decays(sums_BMQH, piece)
            added[:, piece.chunks] = portable.states(x, B, decays)
            leaving += (added[:, piece.chunks] * tail_BMH11[:, piece.chunks]).sum(1)
        ctx.plan = plan
        ctx.save_for_backward(x_BTHP, sums_BMQH, B_BTGN, added)
        return added, leaving, slot(x_BTHP.shape, added), slot(B_BTGN.shape, added)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_added, grad_leaving, grad_x, grad_B = grads
        plan: Plan = ctx.plan
        x_BTHP, sums_BMQH, B_BTGN, added = ctx.saved_tensors
        grad_sums, tail_BMH = torch.zeros_like(sums_BMQH), plan.tails(sums_BMQH)
        left_BMH = torch.zeros_like(sums_BMQH[:, :, 0])  # the part of each chunk in grad_leaving . leaving
        for piece in plan.unpaired:
            arrived = grad_leaving.unsqueeze(1) * tail_BMH[:, piece.chunks, :, None, None]
            left_BMH[:, piece.chunks] = torch.linalg.vecdot(arrived.flatten(3), added[:, piece.chunks].flatten(3))
            arrived += grad_added[:, piece.chunks]
            x, B, decays = plan.cut(x_BTHP, piece), plan.cut(B_BTGN, piece), plan.decays(sums_BMQH, piece)
            dx, dB, dsums = portable.states_backward(arrived, x, B, decays)
            plan.cut(grad_x, piece).add_(dx)
            plan.cut(grad_B, piece).add_(dB)
            grad_sums[:, piece.chunks, : piece.chunk] = dsums
        grad_sums[:, :, -1:] += (left_BMH.cumsum(1) - left_BMH).unsqueeze(2)  # what has left earlier crosses a chunk
        return None, grad_x.to(x_BTHP.dtype), grad_sums, grad_B.to(B_BTGN.dtype)


class Local(torch.autograd.Function):
    """(what each chunk's own tokens give its outputs, (B, T, H, P) in the dtype of the computation, a slot of C)."""

    @staticmethod
    @own_precision
    def forward(
        ctx: Any, plan: Plan, x_BTHP: Tensor, sums_BMQH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, *slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        y_BTHP = torch.empty(x_BTHP.shape, dtype=plan.dtype, device=x_BTHP.device)
        for piece in plan.paired:
            x, B, C = (plan.cut(tensor, piece) for tensor in (x_BTHP, B_BTGN, C_BTGN))
            plan.cut(y_BTHP, piece).copy_(portable.local(x, B, C, plan.decays(sums_BMQH, piece)))
        ctx.plan = plan
        ctx.save_for_backward(x_BTHP, sums_BMQH, B_BTGN, C_BTGN)
        return y_BTHP, slot(C_BTGN.shape, y_BTHP)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, grad_C = grads
        plan: Plan = ctx.plan
        x_BTHP, sums_BMQH, B_BTGN, C_BTGN = ctx.saved_tensors
        grad_x, grad_B = (torch.empty(of.shape, dtype=plan.dtype, device=of.device) for of in (x_BTHP, B_BTGN))
        grad_sums = torch.zeros_like(sums_BMQH)
        for piece in plan.paired:
            dy, x, B, C = (plan.cut(tensor, piece) for tensor in (grad_y, x_BTHP, B_BTGN, C_BTGN))
            dx, dB, dC, dsums = portable.local_backward(dy, x, B, C, plan.decays(sums_BMQH, piece))
            plan.cut(grad_x, piece).copy_(dx)
            plan.cut(grad_B, piece).copy_(dB)
            plan.cut(grad_C, piece).add_(dC)
            grad_sums[:, piece.chunks, : piece.chunk] = dsums
        return None, None, grad_sums, None, grad_C.to(C_BTGN.dtype), grad_x, grad_B


class ReadOut(torch.autograd.Function):
    """`y_BTHP`, to which is added, in place, what the states that enter the chunks give their outputs."""

    @staticmethod
    @own_precision
    def forward(
        ctx: Any, plan: Plan, y_BTHP: Tensor, entering_BHPN: Tensor, added: Tensor, sums_BMQH: Tensor,
        C_BTGN: Tensor, *slots: Tensor,
    ) -> Tensor:  # fmt: skip
        state, boundaries = entering_BHPN, []
        for piece in plan.unpaired:
            boundaries.append(state)
            decays = plan.decays(sums_BMQH, piece)
            entering, state = portable.pass_states(state, added[:, piece.chunks], decays.whole_BMH)
            read = portable.readout(entering, plan.cut(C_BTGN, piece))
            plan.cut(y_BTHP, piece).addcmul_(read, decays.since_BMQH1)
        ctx.plan = plan
        ctx.save_for_backward(added, sums_BMQH, C_BTGN, *boundaries)
        ctx.mark_dirty(y_BTHP)
        return y_BTHP

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        plan: Plan = ctx.plan
        added, sums_BMQH, C_BTGN, *boundaries = ctx.saved_tensors
        grad_C = torch.empty(C_BTGN.shape, dtype=plan.dtype, device=C_BTGN.device)
        grad_added, grad_sums = torch.empty_like(added), torch.zeros_like(sums_BMQH)
        (batch, _, heads, width), states = grad_y.shape, C_BTGN.shape[3]
        adjoint = added.new_zeros(batch, heads, width, states)
        for piece, state in zip(reversed(plan.unpaired), reversed(boundaries), strict=True):
            decays = plan.decays(sums_BMQH, piece)
            entering, _ = portable.pass_states(state, added[:, piece.chunks], decays.whole_BMH)
            dy, C = plan.cut(grad_y, piece), plan.cut(C_BTGN, piece)
            dentering, dC, dsums = portable.readout_backward(dy, entering, C, decays)
            dadded, adjoint, dwhole = portable.pass_backward(adjoint, dentering, entering, decays)
            dsums[:, :, -1] += dwhole
            grad_added[:, piece.chunks] = dadded
            plan.cut(grad_C, piece).copy_(dC)
            grad_sums[:, piece.chunks, : piece.chunk] = dsums
        return None, grad_y, adjoint, grad_added, grad_sums, None, grad_C


class PortableStages:
    """The three stages in PyTorch; see `begin_state_space_dual`, which checks and prepares the arguments."""

    def __init__(
        self,
        x_BTHP: Tensor,
        log_decay_BTH: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        starts_BT: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> None:
        self._plan = Plan.make(x_BTHP, chunk, dtype, starts_BT)
        self._sums = sums_of_chunks(log_decay_BTH, chunk)
        self._x, self._B, self._C = x_BTHP, B_BTGN, C_BTGN
        self._added, self.leaving, *self._slots = States.apply(self._plan, x_BTHP, self._sums, B_BTGN)

    def compute_local(self) -> None:
        """Most of the work; to be called once, between the sending of `leaving` and `finish`."""
        tensors = self._x.detach(), self._sums, self._B.detach(), self._C
        self._y, self._slot = Local.apply(self._plan, *tensors, *self._slots)

    def finish(self, entering_BHPN: Tensor) -> Tensor:
        """y_BTHP in the dtype of x, given the state before the first token."""
        entering_BHPN = entering_BHPN.to(self._plan.dtype)
        tensors = entering_BHPN, self._added, self._sums, self._C.detach()
        return ReadOut.apply(self._plan, self._y, *tensors, self._slot).to(self._x.dtype)
