"""The heart: the state that enters this shard, composed from the summaries of all earlier shards.

A linear recurrence over a shard acts on the state entering it as an affine map, state_out = M state_in + c, where c
is the state the shard reaches from zero. The state entering shard r is the exclusive prefix of these maps. Its
backward pass is the same prefix over the transposed maps from right to left: with G_r the gradient of c_r,
G_{r-1} = M_r' G_r + dL/d(state entering r), and dL/dM_r = G_r (x) state entering r.

Messages never grow with the sequence's length. States and decay sums travel in float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .flight import Flight, arrive, depart
from .prefix_strategies import STRATEGIES, choose_strategy
from .segment import Segment
from .shard import SequenceShard
from .transitions import Transition


def prefix_state(
    transition: Transition,
    state: Tensor,
    shard: SequenceShard,
    *,
    initial: Tensor | None = None,
    strategy: str | None = None,
) -> Tensor:
    """The state entering this shard. Differentiable in the states and the transition.

    Args:
        transition: how the state entering this shard acts on the one leaving it.
        state: (B, channels or heads, ...) the state this shard reaches from zero, float32, float64 or complex (half
            types are computed and sent in float32).
        initial: the state before the sequence, the same on every process; by default the empty one.
        strategy: a key of `prefix_strategies.STRATEGIES`, or "auto" for the cost model's choice; by default what the
            shard asks for. All give the same result up to rounding.

    Raises:
        ValueError: an unknown strategy.
    """
    return begin_prefix_state(transition, state, shard, initial=initial, strategy=strategy).wait()


def begin_prefix_state(
    transition: Transition,
    state: Tensor,
    shard: SequenceShard,
    *,
    initial: Tensor | None = None,
    strategy: str | None = None,
) -> PendingState:
    """`prefix_state` in two halves: the message leaves now, `wait` returns the state. Compute in between.

    In the backward pass the halves swap: the gradient's message leaves where `wait` was and is awaited here.
    """
    strategy = strategy or shard.strategies.prefix
    if strategy != "auto" and strategy not in STRATEGIES:
        raise ValueError(f"unknown prefix strategy {strategy!r}: choose auto, {', '.join(sorted(STRATEGIES))}")
    if shard.size == 1:
        return PendingState(None, transition.empty(state) if initial is None else initial)
    if shard.rank > 0:
        initial = None
    if initial is not None:
        state = transition.after(initial, state, shard.local_length)
    flight = _Flight(transition, shard, strategy)
    return PendingState(flight, depart(flight, state, *transition.inputs()), initial)


@dataclass
class PendingState:
    """A state under way; without a flight it is already here."""

    _flight: _Flight | None
    _anchor: Tensor
    _initial: Tensor | None = None

    def wait(self) -> Tensor:
        """The state entering this shard."""
        if self._flight is None:
            return self._anchor
        (state,) = arrive(self._flight, self._anchor)
        return state if self._initial is None else self._flight.transition.merge(state, self._initial)


class _Flight(Flight):
    """States on their way: left to right, and their gradients right to left."""

    def __init__(self, transition: Transition, shard: SequenceShard, strategy: str) -> None:
        self.transition = transition
        self.shard = shard
        self.strategy = strategy
        self._land: Callable[[], Tensor] | None = None
        self._entering: Tensor | None = None

    def send(self, *tensors: Tensor) -> None:
        """This shard's own state and its transition's tensors."""
        state, *inputs = tensors
        # sums of steps are composed on the way: they too in float32 or better
        self.transition = self.transition.with_inputs(tuple(_at_least_float32(x) for x in inputs))
        self._dtype, self._input_dtypes = state.dtype, [x.dtype for x in inputs]
        self._own = _at_least_float32(state)
        self._send(self._own, reverse=False)

    def land(self) -> tuple[Tensor, ...]:
        """The entering state."""
        assert self._land is not None
        self._entering = self._land()
        # a copy: autograd's output must not be what its own node keeps, or neither would ever be freed
        return (self._entering.to(self._dtype, copy=True),)

    def send_back(self, *gradients: Tensor) -> None:
        assert self._entering is not None
        gradient = gradients[0].to(self._own.dtype)
        self._send(self.transition.gradient_to_send(gradient, self._entering), reverse=True)

    def land_back(self) -> tuple[Tensor, ...]:
        assert self._land is not None and self._entering is not None
        arrived = self._land()
        inputs = tuple(tensor.detach().requires_grad_() for tensor in self.transition.inputs())
        grads: tuple[Tensor, ...] = ()
        if inputs:
            with torch.enable_grad():
                transition = self.transition.with_inputs(inputs)
                moved = transition.apply(transition.travelling(), self.shard.local_length, self._entering)
                gradient = transition.gradient_of_moved(arrived, moved.detach())
                if transition.reset is not None:
                    gradient = gradient.masked_fill(_expand(transition.reset, gradient), 0)
                grads = torch.autograd.grad(moved, inputs, gradient)
        grads = tuple(grad.to(dtype) for grad, dtype in zip(grads, self._input_dtypes, strict=True))
        return self.transition.gradient_of_own(arrived, self._own).to(self._dtype), *grads

    def _send(self, state: Tensor, *, reverse: bool) -> None:
        keep = None
        if self.shard.document_starts is not None:
            keep = torch.ones(state.shape[0], device=state.device)
            if self.transition.reset is not None:
                keep = keep.masked_fill(self.transition.reset.expand(state.shape[0]), 0)
        segment = Segment(self.transition, self.transition.travelling(), keep, state, self.shard.local_length)
        name = choose_strategy(self.strategy, segment, self.shard)
        motion = "prefix_state.backward" if reverse else "prefix_state.forward"
        self._land = STRATEGIES[name](segment, self.shard, reverse, motion)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expand(mask_B: Tensor, like: Tensor) -> Tensor:
    return mask_B.reshape(-1, *([1] * (like.dim() - 1)))
