"""RWKV-4's recurrence in PyTorch, with recomputation.

The common exponent p of numerator and denominator is itself a recurrence, p_t = max(p_{t-1} + log decay, k_t). Given
all p of a segment, numerator and denominator are linear recurrences whose decays exp(p_{t-1} + log decay - p_t) and
inputs exp(k_t - p_t) are at most one. Tokens are cut into chunks that advance together, one call per token of a chunk;
then the states go from chunk to chunk. The forward keeps one state per segment, the backward recomputes it segment by
segment.

The exponent only chooses a representation, so the outputs do not depend on it, and derivatives may treat it as a
constant. The returned state does show it: what its gradient holds beyond that invariance goes to the key that set it.

Legend: B batch, T tokens, D channels, S tokens of a segment (M chunks of Q). Inside a segment tokens come first;
a state is (B, 2, D), numerator and denominator, beside an exponent (B, D).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import first_order

EMPTY = (0.0, 0.0, -1e38)  # (a, b, p) of a state that has seen nothing; the exponent is finite, so differences stay so
_SEGMENT_ELEMENTS = 1 << 18


def _plan(length: int, elements: int, device: torch.device) -> tuple[int, int]:
    """(tokens of a segment, tokens of a chunk)."""
    budget = _SEGMENT_ELEMENTS if device.type == "cpu" else _SEGMENT_ELEMENTS << 6
    segment = min(length, 4096, max(64, budget // max(1, elements)))
    return max(1, segment), 1 if segment < 64 else 32 if segment > 512 else 16


def _running_exponent(k_SBD: Tensor, log_decay: Tensor, p_BD: Tensor, chunk: int) -> Tensor:
    """(S + 1, B, D): p_t = max(p_{t-1} + log_decay_t, k_t), beginning with the entering p."""
    p_MQBD = k_SBD.unflatten(0, (-1, chunk)).clone()
    decay_MQBD = log_decay.expand_as(k_SBD).unflatten(0, (-1, chunk))
    for q in range(1, chunk):
        torch.maximum(p_MQBD[:, q], p_MQBD[:, q - 1] + decay_MQBD[:, q], out=p_MQBD[:, q])
    summed_MQBD = decay_MQBD.cumsum(1)
    entering = []
    state_BD = p_BD
    for last, whole in zip(p_MQBD[:, -1].unbind(0), summed_MQBD[:, -1].unbind(0), strict=True):
        entering.append(state_BD)
        state_BD = torch.maximum(last, state_BD + whole)
    torch.maximum(p_MQBD, torch.stack(entering).unsqueeze(1) + summed_MQBD, out=p_MQBD)
    return torch.cat((p_BD.unsqueeze(0), p_MQBD.flatten(0, 1)))


def _scan(x: Tensor, decay_SBD: Tensor, entering: Tensor, chunk: int, *, reverse: bool) -> Tensor:
    """x[t] += decay[t] x[t-1] in place for (S, B, 2, D), or from the right with decay[t] x[t+1]; returns the last."""
    x_MQ = x.unflatten(0, (-1, chunk))
    decay_MQ = decay_SBD.unflatten(0, (-1, chunk)).unsqueeze(3)
    product_MQ = decay_MQ.clone()
    order = range(chunk - 2, -1, -1) if reverse else range(1, chunk)
    step = 1 if reverse else -1
    for q in order:
        x_MQ[:, q].addcmul_(decay_MQ[:, q], x_MQ[:, q + step])
        product_MQ[:, q].mul_(product_MQ[:, q + step])
    end = 0 if reverse else chunk - 1
    carried = torch.empty_like(x_MQ[:, 0])
    chunks = range(len(x_MQ) - 1, -1, -1) if reverse else range(len(x_MQ))
    state = entering
    for m in chunks:
        carried[m] = state
        state = torch.addcmul(x_MQ[m, end], product_MQ[m, end], state)
    x_MQ.addcmul_(product_MQ, carried.unsqueeze(1))
    return state


@dataclass
class _Segment:
    """One segment recomputed; first dimension tokens, padded to whole chunks."""

    v: Tensor
    exponent: Tensor  # p_0 ... p_S
    log_decay: Tensor  # -inf where a document begins
    decay: Tensor  # of the state, token by token
    weight: Tensor  # exp(k - p), of the token in the state
    states: Tensor  # (S + 1, B, 2, D), the entering one first
    past: Tensor  # weights of the state and of the token itself in its output
    now: Tensor
    key: Tensor

    def outputs(self) -> tuple[Tensor, Tensor]:
        """y and its denominator."""
        before = self.states[:-1]
        denominator = torch.addcmul(self.now, self.past, before[:, :, 1])
        return torch.addcmul(self.now * self.v, self.past, before[:, :, 0]).div_(denominator), denominator


def _run(
    k_BSD: Tensor, v_BSD: Tensor, log_decay_D: Tensor, bonus_D: Tensor, state_BD3: Tensor, starts_BS: Tensor | None,
    chunk: int,
) -> _Segment:  # fmt: skip
    dtype, tokens = state_BD3.dtype, k_BSD.shape[1]
    padding = (0, 0, 0, 0, 0, -tokens % chunk)
    # a padding token has no weight, and lets the state pass unchanged
    k = F.pad(k_BSD.transpose(0, 1).to(dtype), padding, value=EMPTY[2])
    v = F.pad(v_BSD.transpose(0, 1).to(dtype), padding)
    log_decay = log_decay_D
    if starts_BS is not None:
        log_decay = torch.where(starts_BS.t().unsqueeze(2), -torch.inf, log_decay)
        log_decay = F.pad(log_decay, padding)
    elif padding[-1]:
        log_decay = F.pad(log_decay_D.expand(tokens, 1, -1), padding)
    exponent = _running_exponent(k, log_decay, state_BD3[..., 2], chunk)
    before, after = exponent[:-1], exponent[1:]
    decay = (before + log_decay).sub_(after).exp_()
    weight = (k - after).exp_()
    if padding[-1]:
        weight[tokens:] = 0.0
    states = k.new_empty(len(exponent), k.shape[1], 2, k.shape[2])
    states[0] = state_BD3[..., :2].mT
    torch.mul(weight, v, out=states[1:, :, 0])
    states[1:, :, 1] = weight
    _scan(states[1:], decay, states[0], chunk, reverse=False)
    if starts_BS is not None:  # the output of a document's first token does not see the state either
        before = torch.where(F.pad(starts_BS.t(), (0, 0, 0, -tokens % chunk)).unsqueeze(2), -torch.inf, before)
    own = k + bonus_D
    larger = torch.maximum(before, own)
    return _Segment(
        v, exponent, log_decay, decay, weight, states, (before - larger).exp_(), own.sub_(larger).exp_(), k
    )  # fmt: skip


def _as_state(segment: _Segment) -> Tensor:
    return torch.cat((segment.states[-1], segment.exponent[-1].unsqueeze(1)), 1).mT.contiguous()


def _ranges(length: int, tokens: int) -> list[tuple[int, int]]:
    return [(start, min(start + tokens, length)) for start in range(0, length, tokens)]


class Wkv4(torch.autograd.Function):
    """The recurrence with recomputation; call it through `wkv4`, which checks and prepares the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        k_BTD: Tensor,
        v_BTD: Tensor,
        log_decay_D: Tensor,
        bonus_D: Tensor,
        state_BD3: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length, channels = k_BTD.shape
        ctx.tokens, ctx.chunk = _plan(length, batch * channels, k_BTD.device)
        y_BTD = torch.empty_like(v_BTD)
        boundaries = []
        for start, stop in _ranges(length, ctx.tokens):
            boundaries.append(state_BD3)
            mask = None if starts_BT is None else starts_BT[:, start:stop]
            cut = slice(start, stop)
            segment = _run(k_BTD[:, cut], v_BTD[:, cut], log_decay_D, bonus_D, state_BD3, mask, ctx.chunk)
            y_BTD[:, cut] = segment.outputs()[0][: stop - start].transpose(0, 1)
            state_BD3 = _as_state(segment)
        ctx.save_for_backward(k_BTD, v_BTD, log_decay_D, bonus_D, starts_BT, *boundaries)
        return y_BTD, state_BD3.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y_BTD, grad_state_BD3 = grads
        k_BTD, v_BTD, log_decay_D, bonus_D, starts_BT, *boundaries = ctx.saved_tensors
        grad_k, grad_v = torch.empty_like(k_BTD), torch.empty_like(v_BTD)
        grad_decay_D, grad_bonus_D = torch.zeros_like(log_decay_D), torch.zeros_like(bonus_D)
        adjoint_B2D = grad_state_BD3[..., :2].mT
        excess_BD: Tensor | None = None
        entering_BD3 = None
        for (start, stop), entering_BD3 in reversed(
            list(zip(_ranges(k_BTD.shape[1], ctx.tokens), boundaries, strict=True))
        ):
            cut, tokens = slice(start, stop), stop - start
            mask = None if starts_BT is None else starts_BT[:, cut]
            segment = _run(k_BTD[:, cut], v_BTD[:, cut], log_decay_D, bonus_D, entering_BD3, mask, ctx.chunk)
            if excess_BD is None:
                excess_BD = grad_state_BD3[..., 2] - (adjoint_B2D * segment.states[-1]).sum(1)
            grad_SBD = grad_y_BTD[:, cut].transpose(0, 1).to(log_decay_D.dtype)
            grad_SBD = F.pad(grad_SBD, (0, 0, 0, 0, 0, -tokens % ctx.chunk))
            parts = _segment_backward(segment, tokens, grad_SBD, adjoint_B2D, ctx.chunk)
            key_SBD, value_SBD, decay_D, own_D, adjoint_B2D = parts
            excess_BD, count_BD = _to_the_key_that_set_it(segment, tokens, excess_BD, key_SBD)
            grad_k[:, cut] = key_SBD[:tokens].transpose(0, 1)
            grad_v[:, cut] = value_SBD[:tokens].transpose(0, 1)
            grad_decay_D += decay_D + count_BD.sum(0)
            grad_bonus_D += own_D
        if entering_BD3 is None or excess_BD is None:  # no tokens
            return grad_k, grad_v, grad_decay_D, grad_bonus_D, grad_state_BD3, None
        exponent_BD = (adjoint_B2D.mT * entering_BD3[..., :2]).sum(-1) + excess_BD
        grad_entering_BD3 = torch.cat((adjoint_B2D.mT, exponent_BD.unsqueeze(-1)), -1)
        return grad_k, grad_v, grad_decay_D, grad_bonus_D, grad_entering_BD3, None


def _segment_backward(
    segment: _Segment, tokens: int, grad_SBD: Tensor, adjoint_B2D: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of keys, values (S, B, D), decay and bonus (D,) and entering state (B, 2, D); exponents constant."""
    y, denominator = segment.outputs()
    numerator_grad = grad_SBD / denominator
    denominator_grad = -numerator_grad * y
    # adjoint[t]: of the state after token t - 1
    adjoint = torch.empty_like(segment.states)
    torch.mul(segment.past, numerator_grad, out=adjoint[:-1, :, 0])
    torch.mul(segment.past, denominator_grad, out=adjoint[:-1, :, 1])
    adjoint[-1] = adjoint_B2D
    entering = _scan(adjoint[:-1], segment.decay, adjoint_B2D, chunk, reverse=True)
    after = adjoint[1:]
    own_term = torch.addcmul(denominator_grad, segment.v, numerator_grad).mul_(segment.now)
    state_term = torch.addcmul(after[:, :, 1], segment.v, after[:, :, 0]).mul_(segment.weight)
    value = torch.addcmul(segment.now * numerator_grad, segment.weight, after[:, :, 0])
    # padding passes the state on without a decay
    decay_D = ((segment.states[:-1] * after).sum(2) * segment.decay)[:tokens].sum((0, 1))
    bonus_D = own_term.sum((0, 1))
    return own_term.add_(state_term), value, decay_D, bonus_D, entering


def _to_the_key_that_set_it(
    segment: _Segment, tokens: int, excess_BD: Tensor, key_SBD: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the last exponent's gradient to the key it comes from, and count the decays on the way.

    Returns what belongs to an earlier segment, and the gradient of the log decay per sequence and channel.
    """
    before = (segment.exponent[:-1] + segment.log_decay)[:tokens]
    sets_SBD = segment.key[:tokens] >= before
    positions = torch.arange(1, tokens + 1, device=sets_SBD.device)[:, None, None]
    latest_BD = (sets_SBD * positions).amax(0)
    found_BD = latest_BD > 0
    key_SBD.scatter_add_(
        0, (latest_BD - 1).clamp_min(0).unsqueeze(0), torch.where(found_BD, excess_BD, 0.0).unsqueeze(0)
    )
    return torch.where(found_BD, 0.0, excess_BD), excess_BD * (tokens - latest_BD)


def summary_segment(
    state_BD3: Tensor, sequences: Sequence[Tensor], parameters: Sequence[Tensor], starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment of `walk` for the final state alone. No outputs."""
    (k_BSD, v_BSD), (log_decay_D,) = sequences, parameters
    dtype, tokens = state_BD3.dtype, k_BSD.shape[1]
    left = torch.arange(tokens - 1, -1, -1, device=k_BSD.device, dtype=dtype)
    exponent_BSD = k_BSD.to(dtype) + left[:, None] * log_decay_D
    a, b, p = state_BD3.unbind(-1)
    entering_BD = p + tokens * log_decay_D
    if starts_BT is not None:
        following_BS = starts_BT.long().flip(1).cumsum(1).flip(1) - starts_BT.long()
        exponent_BSD = exponent_BSD.masked_fill((following_BS > 0).unsqueeze(2), -torch.inf)
        entering_BD = entering_BD.masked_fill(starts_BT.any(1, keepdim=True), -torch.inf)
    nothing = k_BSD.new_zeros(k_BSD.shape[0], tokens, 0)
    if not tokens:
        return nothing, state_BD3
    p = torch.maximum(entering_BD, exponent_BSD.amax(1))
    weight_BSD, past_BD = (exponent_BSD - p.unsqueeze(1)).exp(), (entering_BD - p).exp()
    numerator_BD = past_BD * a + (weight_BSD * v_BSD.to(dtype)).sum(1)
    return nothing, torch.stack((numerator_BD, past_BD * b + weight_BSD.sum(1), p), -1)
