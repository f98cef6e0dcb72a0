"""The modal convolution in three stages, so that a split sequence's states travel while its outputs are computed.

First what every chunk adds to the state, and so the states between chunks had the sequence begun from zero, and the one
that leaves; then what each chunk's own tokens give its outputs, most of the work; last, with the state that enters,
what the states before the chunks give them. That state joins those of the chunks for as long as it is alive in them,
and is not followed where it is not. The backward pass goes through the stages in reverse: after the first of its
stages it has the gradient of the entering state, and only the last needs that of the leaving one.

Between the stages lie the outputs and one state for each chunk, nothing bigger. For the input's slot see
kernels/stages.py.

Legend: as in portable.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order, own_precision
from ..stages import slot
from .arrival import Arrival
from .pieces import Piece, Plan
from .portable import by_chunk, modal_tables, pass_states, real_parts


class States(torch.autograd.Function):
    """(the state before each chunk as rows, the state that leaves (D, B, N), a slot of u as rows)."""

    @staticmethod
    @own_precision
    def forward(
        ctx: Any, plan: Plan, u_BTD: Tensor, enter_DQS: Tensor, power_DN: Tensor, tail_power_DN: Tensor
    ) -> tuple[Tensor, ...]:
        before = plan.state_buffer(enter_DQS, enter_DQS.shape[2])
        state_DBN = power_DN.new_zeros(plan.channels, plan.batch, power_DN.shape[1])
        for piece in plan.pieces:
            u_DRQ = plan.cut(u_BTD, piece)
            if piece.documents is not None:
                u_DRQ = u_DRQ * piece.documents.last_RQ
            added_DRS = torch.bmm(u_DRQ, enter_DQS[:, plan.chunk - piece.chunk :])
            added_MDBN = by_chunk(plan.by_sequence(added_DRS), state_DBN.is_complex())
            powers = [power_DN if piece.chunk == plan.chunk else tail_power_DN] * piece.chunks
            entering_MDBN, state_DBN = pass_states(state_DBN, added_MDBN, powers, piece.keep_BM)
            rows_DBMS = plan.by_sequence(plan.state_rows(before, piece))
            rows_DBMS.copy_(real_parts(entering_MDBN).permute(1, 2, 0, 3))
        ctx.plan = plan
        ctx.save_for_backward(u_BTD, enter_DQS, power_DN, tail_power_DN, before)
        return before, state_DBN.clone(), slot([plan.batch * plan.length * plan.channels], enter_DQS)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_before, adjoint_DBN, grad_rows = grads
        plan: Plan = ctx.plan
        u_BTD, enter_DQS, power_DN, tail_power_DN, before = ctx.saved_tensors
        grad_u, grad_enter = torch.empty_like(u_BTD), torch.zeros_like(enter_DQS)
        grad_power, grad_tail_power = torch.zeros_like(power_DN), torch.zeros_like(tail_power_DN)
        for piece in reversed(plan.pieces):
            whole = piece.chunk == plan.chunk
            power, grad = (power_DN, grad_power) if whole else (tail_power_DN, grad_tail_power)
            arriving, entering = (
                by_chunk(plan.by_sequence(plan.state_rows(rows, piece)), power_DN.is_complex())
                for rows in (grad_before, before)
            )
            powers, keep_BM = [power.conj().resolve_conj()] * piece.chunks, piece.keep_BM
            added_MDBN, adjoint_DBN = pass_states(adjoint_DBN, arriving, powers, keep_BM, reverse=True)
            crossing_MDBN = entering.conj() * added_MDBN
            if keep_BM is not None:
                crossing_MDBN *= keep_BM.t().unsqueeze(1).unsqueeze(3)
            grad += crossing_MDBN.sum((0, 2))
            added_DRS = real_parts(added_MDBN.permute(1, 2, 0, 3).flatten(1, 2)).to(plan.dtype)
            u_DRQ, enter = plan.cut(u_BTD, piece), slice(plan.chunk - piece.chunk, None)
            du_DRQ = torch.bmm(added_DRS, enter_DQS[:, enter].mT)
            if piece.documents is not None:
                u_DRQ, du_DRQ = (rows * piece.documents.last_RQ for rows in (u_DRQ, du_DRQ))
            grad_enter[:, enter].baddbmm_(u_DRQ.mT, added_DRS)
            plan.put(grad_u, piece, du_DRQ.add_(plan.token_rows(grad_rows, piece)))
        return None, grad_u, grad_enter, grad_power, grad_tail_power


class Local(torch.autograd.Function):
    """What each chunk's own tokens give its outputs, as rows."""

    @staticmethod
    @own_precision
    def forward(ctx: Any, plan: Plan, u_BTD: Tensor, toeplitz_DQQ: Tensor, slot: Tensor) -> Tensor:
        y = plan.token_buffer(toeplitz_DQQ)
        for piece in plan.pieces:
            u_DRQ = plan.cut(u_BTD, piece)
            if piece.documents is not None:
                u_DRQ = piece.documents.apart(u_DRQ)
            plan.token_rows(y, piece).copy_(_products(u_DRQ, toeplitz_DQQ, piece))
        ctx.plan = plan
        ctx.save_for_backward(u_BTD, toeplitz_DQQ)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        u_BTD, toeplitz_DQQ = ctx.saved_tensors
        grad_u, grad_toeplitz = plan.token_buffer(toeplitz_DQQ), torch.zeros_like(toeplitz_DQQ)
        for piece in plan.pieces:
            u_DRQ, dy_DRQ = plan.cut(u_BTD, piece), plan.token_rows(grads[0], piece)
            if piece.documents is not None:
                u_DRQ, dy_DRQ = piece.documents.apart(u_DRQ), piece.documents.apart(dy_DRQ)
            grad_toeplitz[:, : piece.chunk, : piece.chunk].baddbmm_(u_DRQ.mT, dy_DRQ)
            plan.token_rows(grad_u, piece).copy_(_products(dy_DRQ, toeplitz_DQQ.mT, piece))
        return None, None, grad_toeplitz, grad_u


def _products(rows_DRQ: Tensor, matrix_DQQ: Tensor, piece: Piece) -> Tensor:
    """Those of each document's rows with the matrix, or its first rows and columns, as a row for each chunk."""
    out_DRQ = torch.bmm(rows_DRQ, matrix_DQQ[:, : piece.chunk, : piece.chunk])
    return out_DRQ if piece.documents is None else piece.documents.together(out_DRQ)


class ReadOut(torch.autograd.Function):
    """y_BTD, in `dtype`: the local outputs, and what the states before the chunks give."""

    @staticmethod
    @own_precision
    def forward(
        ctx: Any,
        plan: Plan,
        y: Tensor,
        before: Tensor,
        state_BDN: Tensor,
        log_poles_DN: Tensor,
        leave_DSQ: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        arrival = Arrival.of(plan, state_BDN, log_poles_DN)
        y_BTD = y.new_empty(plan.batch, plan.length, plan.channels, dtype=dtype)
        for piece in plan.pieces:
            entering_DRS, leave = arrival.join(before, piece), leave_DSQ[..., : piece.chunk]
            y_DRQ = plan.token_rows(y, piece)
            if piece.documents is None:
                y_DRQ = torch.baddbmm(y_DRQ, entering_DRS, leave)
            else:
                y_DRQ = y_DRQ + torch.bmm(entering_DRS, leave) * piece.documents.from_before_RQ
            plan.put(y_BTD, piece, y_DRQ)
        ctx.plan = plan
        ctx.save_for_backward(before, state_BDN, log_poles_DN, leave_DSQ)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        before, state_BDN, log_poles_DN, leave_DSQ = ctx.saved_tensors
        arrival = Arrival.of(plan, state_BDN, log_poles_DN)
        grad_y, grad_before, grad_leave = (
            plan.token_buffer(before),
            torch.empty_like(before),
            torch.zeros_like(leave_DSQ),
        )
        for piece in plan.pieces:
            dy_DRQ = plan.cut(grads[0], piece)
            plan.token_rows(grad_y, piece).copy_(dy_DRQ)
            if piece.documents is not None:
                dy_DRQ = dy_DRQ * piece.documents.from_before_RQ
            grad_leave[..., : piece.chunk].baddbmm_(arrival.join(before, piece).mT, dy_DRQ)
            dentering_DRS = plan.state_rows(grad_before, piece)
            torch.bmm(dy_DRQ, leave_DSQ[..., : piece.chunk].mT, out=dentering_DRS)
            arrival.collect(dentering_DRS, piece)
        grad_state, grad_poles = arrival.gradients()
        grad_state, grad_poles = grad_state.to(state_BDN.dtype), grad_poles.to(log_poles_DN.dtype)
        return None, grad_y, grad_before, grad_state, grad_poles, grad_leave, None


class PortableStages:
    """The three stages in PyTorch; see `begin_modal_convolution`, which checks the arguments."""

    def __init__(
        self,
        u_BTD: Tensor,
        log_poles_DN: Tensor,
        residues_DN: Tensor,
        skip: Tensor | None,
        starts_BT: Tensor | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> None:
        self._plan = Plan.make(u_BTD, chunk, dtype, starts_BT)
        tables = modal_tables(log_poles_DN, residues_DN, skip, chunk, u_BTD.shape[1] % chunk, dtype)
        self._u, self._log_poles = u_BTD, log_poles_DN
        self._toeplitz, self._leave = tables.toeplitz_DQQ, tables.leave_DSQ
        powers = tables.power_DN, tables.tail_power_DN
        self._before, leaving_DBN, self._slot = States.apply(self._plan, u_BTD, tables.enter_DQS, *powers)
        state_type = dtype.to_complex() if leaving_DBN.is_complex() else dtype
        self.leaving = leaving_DBN.transpose(0, 1).to(state_type).contiguous()

    def compute_local(self) -> None:
        """Most of the work; to be called once, between the sending of `leaving` and `finish`."""
        self._y = Local.apply(self._plan, self._u.detach(), self._toeplitz, self._slot)

    def finish(self, entering_BDN: Tensor) -> Tensor:
        """y_BTD in the dtype of u, given the state before the first token."""
        arguments = self._before, entering_BDN, self._log_poles, self._leave, self._u.dtype
        return ReadOut.apply(self._plan, self._y, *arguments)
