"""Selective scan in PyTorch, for the CPU and any other device, with recomputation.

The sequence is walked in segments of a few hundred tokens. The forward keeps one state per segment boundary; the
backward walks the segments from the right, recomputes the states of one of them and carries the adjoint state to the
next. Nothing of size length x channels x states ever exists, and states come in and go out with gradients.

Adjoint of h_t = a_t h_{t-1} + s_t u_t B_t, y_t = C_t h_t, with a_t = exp(s_t A) and s_t the step size:
    g_t = C_t dy_t + a_{t+1} g_{t+1},   dC_t = sum_d dy_t h_t,   dB_t = sum_d g_t s_t u_t,   du_t = s_t sum_n g_t B_t,
    ds_t = u_t sum_n g_t B_t + sum_n p_t A,   dA = sum_t p_t s_t,   where p_t = g_t a_t h_{t-1}.

Legend: B batch, T tokens, D channels, N states per channel, S tokens of one segment. Inside, channels come last: sums
over states are then vector additions. R: sums into which the gradient of A is divided.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import first_order, own_precision
from ..documents import first_start
from .recurrence import Recurrence, SegmentPlan
from .stages import Entering

# The gradient of A is summed over tokens this far apart, and over these sums in the end: a buffer that stays in cache.
_RATE_SUMS = 32


@dataclass
class _Inputs:
    """Everything a segment needs, and how to cut it out as (S, B, ...) in the dtype of the state."""

    u_BTD: Tensor
    delta_BTD: Tensor
    A_ND: Tensor
    B_BTN: Tensor
    C_BTN: Tensor
    D: Tensor | None
    z_BTD: Tensor | None
    delta_bias: Tensor | None
    starts_BT: Tensor | None
    softplus: bool
    plan: SegmentPlan

    def __post_init__(self) -> None:
        # exp2 is several times faster than exp in PyTorch's vectorised CPU code.
        self.A_log2_ND = self.A_ND * math.log2(math.e)
        length, segment = self.u_BTD.shape[1], self.plan.segment
        self.ranges = [(start, min(start + segment, length)) for start in range(0, length, segment)]
        self.has_start = [False] * len(self.ranges)
        if self.starts_BT is not None:
            pieces = [self.starts_BT[:, start:stop].any() for start, stop in self.ranges]
            self.has_start = torch.stack(pieces).tolist() if pieces else []

    @property
    def dtype(self) -> torch.dtype:
        return self.A_ND.dtype

    def cut(self, x_BT: Tensor, start: int, stop: int) -> Tensor:
        return x_BT[:, start:stop].transpose(0, 1).to(self.dtype)


class _Room:
    """Buffers for one segment at a time, (S + 1, B, N, D) each, and the recurrences over them, made once."""

    def __init__(self, inputs: _Inputs) -> None:
        self.plan = inputs.plan
        rows = self.plan.padded(min(self.plan.segment, inputs.u_BTD.shape[1])) + 1
        self._shape = (rows, inputs.u_BTD.shape[0], *inputs.A_ND.shape)
        self._empty = inputs.A_ND.new_empty
        self._recurrences: dict[tuple[int, bool], Recurrence] = {}
        self.decay, self.states, self.product = (self._empty(self._shape) for _ in range(3))

    @cached_property
    def adjoint(self) -> Tensor:
        """The backward's alone."""
        return self._empty(self._shape)

    def scan(self, padded: int, *, reverse: bool = False) -> None:
        """States from decays and inputs; reversed, adjoint states."""
        if (padded, reverse) not in self._recurrences:
            # The adjoint of token t gets a_{t+1} times that of t+1; the last one gets the incoming gradient as it is.
            x, decay = (self.adjoint, self.decay[1:]) if reverse else (self.states, self.decay)
            self._recurrences[padded, reverse] = Recurrence(
                x[: padded + 1], decay[:padded], self.product, self.plan.levels, reverse=reverse
            )
        self._recurrences[padded, reverse].run()


@dataclass
class _Segment:
    """One segment recomputed: step sizes s_t, inputs s_t u_t, decays a_t (then a one), states from h_{t-1} on."""

    step_input_SBD: Tensor
    step_SBD: Tensor
    u_SBD: Tensor
    entering_SBD: Tensor
    B_SBN: Tensor
    C_SBN: Tensor
    decay: Tensor
    states: Tensor
    padded: int


def _run_segment(inputs: _Inputs, index: int, state_BND: Tensor, room: _Room) -> _Segment:
    start, stop = inputs.ranges[index]
    tokens = stop - start
    padded = inputs.plan.padded(tokens)
    step_input_SBD = inputs.cut(inputs.delta_BTD, start, stop)
    if inputs.delta_bias is not None:
        step_input_SBD = step_input_SBD + inputs.delta_bias
    step_SBD = F.softplus(step_input_SBD) if inputs.softplus else step_input_SBD
    u_SBD = inputs.cut(inputs.u_BTD, start, stop)
    B_SBN, C_SBN = inputs.cut(inputs.B_BTN, start, stop), inputs.cut(inputs.C_BTN, start, stop)
    decay, states = room.decay[: padded + 1], room.states[: padded + 1]
    torch.mul(step_SBD.unsqueeze(2), inputs.A_log2_ND, out=decay[:tokens])
    decay[:tokens].exp2_()
    if inputs.has_start[index]:
        assert inputs.starts_BT is not None
        decay[:tokens].masked_fill_(inputs.starts_BT[:, start:stop].transpose(0, 1)[..., None, None], 0.0)
    states[0] = state_BND
    entering_SBD = step_SBD * u_SBD
    torch.mul(entering_SBD.unsqueeze(2), B_SBN.unsqueeze(3), out=states[1 : tokens + 1])
    decay[tokens:] = 1.0  # padding passes the state on unchanged, forwards and backwards
    states[tokens + 1 :] = 0.0
    room.scan(padded)
    return _Segment(step_input_SBD, step_SBD, u_SBD, entering_SBD, B_SBN, C_SBN, decay, states, padded)


def _ungated(inputs: _Inputs, segment: _Segment) -> Tensor:
    """y_SBD before the gate: C h + D u."""
    tokens = segment.u_SBD.shape[0]
    y_SBD = torch.matmul(segment.C_SBN.unsqueeze(2), segment.states[1 : tokens + 1]).squeeze(2)
    return y_SBD if inputs.D is None else y_SBD.addcmul_(segment.u_SBD, inputs.D)


@dataclass
class _Gradients:
    """Gradients filled segment by segment; those of parameters are summed in the dtype of the state."""

    u_BTD: Tensor
    delta_BTD: Tensor
    B_BTN: Tensor
    C_BTN: Tensor
    A_RBND: Tensor
    D: Tensor | None
    z_BTD: Tensor | None
    delta_bias: Tensor | None

    @staticmethod
    def empty(inputs: _Inputs) -> "_Gradients":
        return _Gradients(
            torch.empty_like(inputs.u_BTD),
            torch.empty_like(inputs.delta_BTD),
            torch.empty_like(inputs.B_BTN),
            torch.empty_like(inputs.C_BTN),
            inputs.A_ND.new_zeros(_RATE_SUMS, inputs.u_BTD.shape[0], *inputs.A_ND.shape),
            None if inputs.D is None else torch.zeros_like(inputs.D),
            None if inputs.z_BTD is None else torch.empty_like(inputs.z_BTD),
            None if inputs.delta_bias is None else torch.zeros_like(inputs.delta_bias),
        )


def _undo_gate(inputs: _Inputs, segment: _Segment, grad_SBD: Tensor, start: int, out: _Gradients) -> Tensor:
    """Gradient with respect to the output before the gate; writes the gate's own."""
    if inputs.z_BTD is None or out.z_BTD is None:
        return grad_SBD
    stop = start + grad_SBD.shape[0]
    z_SBD = inputs.cut(inputs.z_BTD, start, stop)
    sigmoid_SBD = torch.sigmoid(z_SBD)
    slope_SBD = torch.addcmul(sigmoid_SBD, z_SBD * sigmoid_SBD, 1 - sigmoid_SBD)
    out.z_BTD[:, start:stop] = (grad_SBD * _ungated(inputs, segment) * slope_SBD).transpose(0, 1)
    return grad_SBD * (z_SBD * sigmoid_SBD)


def _segment_backward(
    inputs: _Inputs, segment: _Segment, start: int, grad_SBD: Tensor, leaving_BND: Tensor, room: _Room, out: _Gradients
) -> Tensor:
    """Fill the gradients of one segment; the adjoint of the state that enters it from that of the one that leaves."""
    tokens = grad_SBD.shape[0]
    stop = start + tokens
    grad_SBD = _undo_gate(inputs, segment, grad_SBD, start, out)
    adjoint, product = room.adjoint[:tokens], room.product[:tokens]
    torch.mul(segment.C_SBN.unsqueeze(3), grad_SBD.unsqueeze(2), out=adjoint)
    room.adjoint[tokens : segment.padded] = 0.0
    room.adjoint[segment.padded] = leaving_BND
    room.scan(segment.padded, reverse=True)
    entering_BND = adjoint[0] * segment.decay[0]
    torch.mul(segment.states[1 : tokens + 1], grad_SBD.unsqueeze(2), out=product)
    out.C_BTN[:, start:stop] = product.sum(3).transpose(0, 1)
    torch.mul(adjoint, segment.entering_SBD.unsqueeze(2), out=product)
    out.B_BTN[:, start:stop] = product.sum(3).transpose(0, 1)
    grad_input_SBD = torch.matmul(segment.B_SBN.unsqueeze(2), adjoint).squeeze(2)
    adjoint.mul_(segment.decay[:tokens]).mul_(segment.states[:tokens])
    torch.mul(adjoint, inputs.A_ND, out=product)
    grad_step_SBD = product.sum(2).addcmul_(segment.u_SBD, grad_input_SBD)
    for rows, step in zip(adjoint.split(_RATE_SUMS), segment.step_SBD.split(_RATE_SUMS), strict=True):
        out.A_RBND[: len(rows)].addcmul_(rows, step.unsqueeze(2))
    grad_u_SBD = grad_input_SBD * segment.step_SBD
    if inputs.D is not None:
        assert out.D is not None
        grad_u_SBD.addcmul_(grad_SBD, inputs.D)
        out.D += (grad_SBD * segment.u_SBD).sum((0, 1))
    out.u_BTD[:, start:stop] = grad_u_SBD.transpose(0, 1)
    if inputs.softplus:
        # Threshold 20, as in the forward: a plain sigmoid would not be its derivative there.
        grad_step_SBD = torch.ops.aten.softplus_backward(grad_step_SBD, segment.step_input_SBD, 1.0, 20.0)
    out.delta_BTD[:, start:stop] = grad_step_SBD.transpose(0, 1)
    if out.delta_bias is not None:
        out.delta_bias += grad_step_SBD.sum((0, 1))
    return entering_BND


class SelectiveScan(torch.autograd.Function):
    """The scan with recomputation; call it through `selective_scan`, which checks and prepares the arguments."""

    @staticmethod
    @own_precision
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
        plan = SegmentPlan.choose(length, batch * A_DN.numel(), u_BTD.device)
        inputs = _Inputs(
            u_BTD, delta_BTD, A_DN.t().contiguous(), B_BTN, C_BTN, D, z_BTD, delta_bias, starts_BT, softplus, plan
        )
        room = _Room(inputs)
        y_BTD = torch.empty(batch, length, channels, dtype=u_BTD.dtype, device=u_BTD.device)
        state_BND = initial_BDN.transpose(1, 2)
        boundaries, sums = [], []
        for index, (start, stop) in enumerate(inputs.ranges):
            boundaries.append(state_BND)
            segment = _run_segment(inputs, index, state_BND, room)
            y_SBD = _ungated(inputs, segment)
            if z_BTD is not None:
                y_SBD = y_SBD * F.silu(inputs.cut(z_BTD, start, stop))
            y_BTD[:, start:stop] = y_SBD.transpose(0, 1)
            state_BND = segment.states[segment.padded].clone()
            if entering is not None:
                sums.append(segment.step_SBD.sum(0))
        kept = torch.stack(boundaries) if boundaries else state_BND[None]
        before_BKD = None
        if entering is not None:
            nothing_B0D = inputs.A_ND.new_empty(batch, 0, channels)
            before_BKD = entering.note(torch.stack(sums, 1) if sums else nothing_B0D)
        saved = (u_BTD, delta_BTD, inputs.A_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, starts_BT, kept, before_BKD)
        ctx.save_for_backward(*saved)
        ctx.softplus, ctx.plan, ctx.entering = softplus, plan, entering
        return y_BTD, state_BND.transpose(1, 2).contiguous()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y_BTD, grad_final_BDN = grads
        u_BTD, delta_BTD, A_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, starts_BT, kept, before_BKD = ctx.saved_tensors
        inputs = _Inputs(u_BTD, delta_BTD, A_ND, B_BTN, C_BTN, D, z_BTD, delta_bias, starts_BT, ctx.softplus, ctx.plan)
        room = _Room(inputs)
        out = _Gradients.empty(inputs)
        late_BDN = None if ctx.entering is None else ctx.entering.state_BDN
        carried_BND = grad_final_BDN.transpose(1, 2)
        for index, (start, stop) in reversed(list(enumerate(inputs.ranges))):
            state_BND = kept[index]
            if late_BDN is not None:
                state_BND = state_BND + _left(inputs, start, before_BKD[:, index], late_BDN)
            segment = _run_segment(inputs, index, state_BND, room)
            grad_SBD = inputs.cut(grad_y_BTD, start, stop).contiguous()  # that of a plain sum has no memory of its own
            carried_BND = _segment_backward(inputs, segment, start, grad_SBD, carried_BND, room, out)
        grad_A_DN, grad_initial_BDN = out.A_RBND.sum((0, 1)).t(), carried_BND.transpose(1, 2)
        return (
            out.u_BTD, out.delta_BTD, grad_A_DN, out.B_BTN, out.C_BTN, out.D, out.z_BTD, out.delta_bias,
            grad_initial_BDN, None, None, None,
        )  # fmt: skip


def _left(inputs: _Inputs, start: int, before_BD: Tensor, entering_BDN: Tensor) -> Tensor:
    """(B, N, D): what is left before token `start` of a state that entered before the first."""
    left_BND = torch.exp2(before_BD.unsqueeze(1) * inputs.A_log2_ND) * entering_BDN.transpose(1, 2)
    if inputs.starts_BT is None:
        return left_BND
    return left_BND.masked_fill_((start > first_start(inputs.starts_BT))[:, None, None], 0.0)
