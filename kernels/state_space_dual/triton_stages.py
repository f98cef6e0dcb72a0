"""The three stages of the state-space dual on a GPU: the state that leaves, the outputs from zero, the read-out.

Forward, the first launches what makes the states of the chunks from zero, the second the outputs, the third what the
entering state adds (`triton_readout`, which stops where the decay has erased it). Backward, the second has the
gradients of C, and the first, which needs the gradient of the leaving state, those of x and B.

Legend: as in triton_dual.py.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..stages import slot
from ..triton_readout import TritonReadout
from .triton_dual import Inputs, suffix_sums


class _Leaving(torch.autograd.Function):
    """(`leaving`, the state that leaves from zero, a slot of y)."""

    @staticmethod
    def forward(
        ctx: Any,
        leaving_BHPN: Tensor,
        x_BTHP: Tensor,
        log_decay_BTH: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT)
        return leaving_BHPN.view_as(leaving_BHPN), slot(x_BTHP.shape, x_BTHP)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_leaving, grad_y = grads
        inputs = Inputs.prepare(*ctx.saved_tensors)
        entering, _ = inputs.entering(None)
        adjoints, _ = inputs.adjoints(grad_y, grad_leaving)
        grad_x, grad_B, earlier = inputs.gradients(grad_y, adjoints, later=False)
        crossing = inputs.crossing(entering, adjoints)
        grad_log = suffix_sums(-earlier, inputs.chunk, crossing)
        return None, grad_x, grad_log.to(ctx.saved_tensors[1].dtype), grad_B, None, None


class _FromZero(torch.autograd.Function):
    """`y_BTHP`, the outputs of a sequence that begins from zero."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BTHP: Tensor,
        x_BTHP: Tensor,
        log_decay_BTH: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        starts_BT: Tensor | None,
        slot: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT)
        return y_BTHP.view_as(y_BTHP)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        inputs = Inputs.prepare(*ctx.saved_tensors)
        _, grad_C, later = inputs.gradients(grad_y, inputs.entering(None)[0], later=True)
        grad_log = suffix_sums(later, inputs.chunk, None)
        return None, None, grad_log.to(ctx.saved_tensors[1].dtype), None, grad_C, None, grad_y


class TritonStages:
    """See `begin_state_space_dual`, which checks the arguments; states are float32."""

    def __init__(
        self, x_BTHP: Tensor, log_decay_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, starts_BT: Tensor | None
    ) -> None:
        self._x, self._log_decay, self._B, self._C, self._starts = x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT
        with torch.no_grad():
            self._inputs = Inputs.prepare(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT)
            self._entering, leaving = self._inputs.entering(None)
        arguments = x_BTHP, log_decay_BTH, B_BTGN, C_BTGN.detach(), starts_BT
        self.leaving, self._slot = _Leaving.apply(leaving, *arguments)

    def compute_local(self) -> None:
        """The outputs from zero, to be computed once, between the sending of `leaving` and `finish`."""
        with torch.no_grad():
            y_BTHP = self._inputs.outputs(self._entering)
        arguments = self._x.detach(), self._log_decay, self._B.detach(), self._C, self._starts, self._slot
        self._y = _FromZero.apply(y_BTHP, *arguments)

    def finish(self, entering_BHPN: Tensor) -> Tensor:
        """y_BTHP in the dtype of x, given the state before the first token."""
        state_BHNP, log_decay_BTH1 = entering_BHPN.float().mT, self._log_decay.unsqueeze(-1)
        return (self._y + TritonReadout.apply(state_BHNP, log_decay_BTH1, self._C, self._starts)).to(self._x.dtype)
