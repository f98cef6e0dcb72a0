"""The three stages of the modal convolution on a GPU: the state that leaves, the outputs from zero, the read-out.

Forward, the first walks all segments from zero without outputs, the second again from the states that enter them, the
third adds what the entering state gives (`triton_readout`, which stops where the decay has erased it). Backward, the
second has the gradients of residues, direct term and poles, and the first, which needs the gradient of the leaving
state, that of u and the leaving state's part in those of the poles.

Legend: as in triton_modal.py.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..stages import slot
from ..triton_support import rows_contiguous
from .triton_modal import Modes, joined, planes
from .triton_readout import TritonModalReadout


def _from_zero(modes: Modes, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """What enters each segment and what leaves the last, when nothing enters the first."""
    ends = modes.walk(u_BTD, u_BTD, None, output=False, reverse=False)
    entering = modes.carry(ends, torch.zeros_like(ends[:, :, 0]))
    return entering, modes.after_last(entering, ends)


class _Leaving(torch.autograd.Function):
    """(`leaving_BDN`, the state that leaves from zero, a slot of y)."""

    @staticmethod
    def forward(
        ctx: Any,
        leaving_BDN: Tensor,
        u_BTD: Tensor,
        log_poles_DN: Tensor,
        residues_DN: Tensor,
        skip: Tensor | None,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u_BTD, log_poles_DN, residues_DN, skip, starts_BT)
        return leaving_BDN.view_as(leaving_BDN), slot(u_BTD.shape, leaving_BDN.real)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_leaving, grad_y = grads[0], rows_contiguous(grads[1])
        u_BTD, log_poles_DN, residues_DN, skip, starts_BT = ctx.saved_tensors
        modes = Modes.prepare(log_poles_DN, residues_DN, starts_BT, skip, u_BTD.shape[1])
        grad_u = torch.empty(u_BTD.shape, dtype=u_BTD.dtype, device=u_BTD.device)
        modes.convolve(grad_y, grad_u, planes(grad_leaving, torch.float32), reverse=True)
        slope = joined(modes.last_slope(u_BTD, _from_zero(modes, u_BTD)[0]), modes.complex_numbers)
        grad_poles = (slope.conj() * grad_leaving).sum(0)
        return None, grad_u, grad_poles.to(log_poles_DN.dtype), None, None, None


class _FromZero(torch.autograd.Function):
    """`y_BTD`, the outputs of a sequence that begins from zero."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        u_BTD: Tensor,
        log_poles_DN: Tensor,
        residues_DN: Tensor,
        skip: Tensor | None,
        starts_BT: Tensor | None,
        slot: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(u_BTD, log_poles_DN, residues_DN, skip, starts_BT)
        return y_BTD.view_as(y_BTD)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y = rows_contiguous(grads[0])
        u_BTD, log_poles_DN, residues_DN, skip, starts_BT = ctx.saved_tensors
        modes = Modes.prepare(log_poles_DN, residues_DN, starts_BT, skip, u_BTD.shape[1])
        (grad_residues, grad_poles), _ = modes.slopes(u_BTD, grad_y, _from_zero(modes, u_BTD)[0])
        many = modes.complex_numbers
        return (
            None,
            None,
            joined(grad_poles, many).to(log_poles_DN.dtype),
            joined(grad_residues, many).to(residues_DN.dtype),
            None if skip is None else (u_BTD.float() * grad_y).sum((0, 1)).to(skip.dtype),
            None,
            grads[0],
        )


class TritonStages:
    """See `begin_modal_convolution`, which checks the arguments; states are float32 or complex64."""

    def __init__(
        self,
        u_BTD: Tensor,
        log_poles_DN: Tensor,
        residues_DN: Tensor,
        skip: Tensor | None,
        starts_BT: Tensor | None,
    ) -> None:
        self._u, self._skip = rows_contiguous(u_BTD), None if skip is None else skip.float()
        self._log_poles, self._residues, self._starts = log_poles_DN, residues_DN, starts_BT
        with torch.no_grad():
            self._modes = Modes.prepare(log_poles_DN, residues_DN, starts_BT, self._skip, u_BTD.shape[1])
            self._entering, last = _from_zero(self._modes, self._u)
        skip = None if self._skip is None else self._skip.detach()
        arguments = self._u, log_poles_DN, residues_DN.detach(), skip, starts_BT
        self.leaving, self._slot = _Leaving.apply(joined(last, self._modes.complex_numbers), *arguments)

    def compute_local(self) -> None:
        """The outputs from zero, to be computed once, between the sending of `leaving` and `finish`."""
        y_BTD = torch.empty(self._u.shape, dtype=torch.float32, device=self._u.device)
        with torch.no_grad():
            self._modes.walk(self._u, y_BTD, self._entering, output=True, reverse=False)
        arguments = self._u.detach(), self._log_poles, self._residues, self._skip, self._starts, self._slot
        self._y = _FromZero.apply(y_BTD, *arguments)

    def finish(self, entering_BDN: Tensor) -> Tensor:
        """y_BTD in the dtype of u, given the state before the first token."""
        arguments = self._log_poles, self._residues, self._u.shape[1], self._starts
        return (self._y + TritonModalReadout.apply(entering_BDN, *arguments)).to(self._u.dtype)
