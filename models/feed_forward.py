"""What stands in the second half of a block: something applied to every token, perhaps with losses of its own.

It is handed the shard because routers balance over all tokens and some channel mixes look one token back.

Shapes: B batch, T tokens of this shard, D model width, F hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..parallel import SequenceShard
from .mixers.base import LayerPlace, Options, State, state_nbytes, step_through
from .parameters import ParameterModule


class FeedForwardOptions(Options, ABC):
    """Options of one kind of feed-forward layer; they know how to build it."""

    @abstractmethod
    def build(self, place: LayerPlace) -> FeedForward:
        """The layer, uninitialised."""


class FeedForward(ParameterModule, ABC):
    """(B, T, D) -> (B, T, D) and a loss."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor | None]:
        """Outputs, and the layer's own loss over all tokens of the step (a scalar, to be added as it is) or None."""

    @abstractmethod
    def flops_per_token(self) -> float:
        """Forward floating-point operations a token (a multiply-add is two)."""

    @property
    def num_idle_parameters(self) -> int:
        """Parameters that one token does not meet."""
        return 0

    def end_step(self) -> None:
        """After an optimiser step: what a layer adapts by other means than gradients. Every process calls it."""

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token; most layers have none."""
        return {}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token later; equal to `forward` token by token."""
        return self(x_BD.unsqueeze(1), SequenceShard.whole(1))[0].squeeze(1), state

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        """Outputs, and the state after this shard's last token; see `Mixer.prefill`."""
        if not state:
            return self(x_BTD, shard)[0], state
        y_BTD, state, _ = step_through(lambda x_BD, s, _: (*self.step(x_BD, s), {}), x_BTD, shard, state, {})
        return y_BTD, state

    def state_bytes(self) -> int:
        """Bytes of the decoding state of one sequence."""
        return state_nbytes(self.init_state(1, torch.device("meta"), next(self.parameters()).dtype))
