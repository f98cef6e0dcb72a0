"""The sequential hand-off: for recurrences that are nonlinear in their state, and so have no short summary.

Processes take turns: each waits for the state that leaves the one before it, runs over its tokens, and passes its own
state on. Split this way a sequence needs no more memory on any process than its share, and takes as long as on one.
The backward pass goes the other way round. Bytes per process: one state each way, to its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.autograd import first_order
from .collectives import receive_from, send_to, verify_chain
from .shard import SequenceShard

Recurrence = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The state before this shard's first token -> (outputs at its tokens, the state after its last)."""


def sequential_state(recurrence: Recurrence, initial: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
    """Run a recurrence over the whole sequence: this shard's outputs and the state after it, both differentiable.

    Args:
        recurrence: runs over this shard's tokens; it begins afresh at its documents' starts by itself. Every process
            calls it once, in rank order.
        initial: the state before the first token of the sequence. Same shape and dtype on every process; its gradient
            is the first process's.
    """
    if shard.size == 1:
        return recurrence(initial)
    verify_chain(initial, shard, "sequential_state.forward")
    # every process takes part in the backward pass, whatever of its own tensors asks for gradients
    anchor = initial.new_zeros(()).requires_grad_(torch.is_grad_enabled())
    entering = _Receive.apply(initial, anchor, shard)
    assert isinstance(entering, Tensor)
    outputs, leaving = recurrence(entering)
    handed = _HandOn.apply(outputs, leaving, entering, shard)
    assert isinstance(handed, tuple)
    return handed


def _pass(x: Tensor | None, like: Tensor, shard: SequenceShard, *, reverse: bool) -> Tensor | None:
    """Send `x` to the next process in turn, or receive what the one before sent where `x` is None; None at the ends."""
    motion = "sequential_state.backward" if reverse else "sequential_state.forward"
    step = 1 if (x is not None) != reverse else -1
    peer = shard.rank + step
    if not 0 <= peer < shard.size:
        return None
    if x is not None:
        send_to(peer, x.to(like.dtype), shard, motion).wait()
        return None
    return receive_from(peer, like, shard, motion).wait()


class _Receive(torch.autograd.Function):
    """Forward awaits the state; backward sends its gradient to where it came from."""

    @staticmethod
    def forward(ctx: Any, initial: Tensor, anchor: Tensor, shard: SequenceShard) -> Tensor:
        ctx.shard = shard
        arrived = _pass(None, initial, shard, reverse=False)
        return initial.clone() if arrived is None else arrived

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        shard: SequenceShard = ctx.shard
        _pass(grads[0], grads[0], shard, reverse=True)
        of_initial = grads[0] if shard.rank == 0 else torch.zeros_like(grads[0])
        return of_initial, grads[0].new_zeros(()), None


class _HandOn(torch.autograd.Function):
    """Forward sends the state; backward awaits its gradient. The entering state passes through so that its gradient is
    sent even where nothing depends on it."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, leaving: Tensor, entering: Tensor, shard: SequenceShard
    ) -> tuple[Tensor, Tensor]:
        ctx.shard = shard
        _pass(leaving, entering, shard, reverse=False)
        return outputs.view_as(outputs), leaving.view_as(leaving)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad_outputs, grad_leaving = grads
        arrived = _pass(None, grad_leaving, ctx.shard, reverse=True)
        grad_leaving = grad_leaving if arrived is None else grad_leaving + arrived
        return grad_outputs, grad_leaving, torch.zeros_like(grad_leaving), None
