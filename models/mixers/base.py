"""What every mixer is: equations over a sequence of which this process holds a shard, and the same one token at a time.

A mixer never speaks to other processes; it hands the shard to the motions of `parallel` (halo, prefix_state,
convolve, causal_attention, ...). Each family is one file beside this one, with its options, and one line in
`models.registry`.

Shapes: B batch, T tokens of this shard, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ...parallel import SequenceShard
from ..parameters import ParameterModule

State = dict[str, Tensor]
"""What a layer remembers between tokens of one decoded batch. The first dimension is the batch, or 1 if rows share."""


@dataclass(frozen=True)
class LayerPlace:
    """Where in the model a layer stands: all that a layer may know of the model around it.

    Attributes:
        index: 0 for the first layer.
        norm_eps: for norms inside the layer.
        init_std: standard deviation of initial weights where the family says no better.
    """

    width: int
    index: int
    num_layers: int
    norm_eps: float
    init_std: float


class Options(BaseModel):
    """Options of one kind of layer, as written in a config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MixerOptions(Options, ABC):
    """Options of one family of mixers; they know how to build it."""

    @abstractmethod
    def build(self, place: LayerPlace) -> Mixer:
        """The mixer for one layer, uninitialised.

        Raises:
            ValueError: options that do not fit the width.
        """


class Mixer(ParameterModule, ABC):
    """Mixes along the sequence: (B, T, D) -> (B, T, D)."""

    max_length: int | None = None
    """The longest sequence that the mixer is defined for; None: any."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        """Outputs at this shard's tokens; every process of the sequence group calls it together."""

    @abstractmethod
    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token; `dtype` is that of the activations."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token later: (y_BD, the next state). Token by token this equals `forward` on one whole document."""

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """Forward floating-point operations a token (a multiply-add is two), mean over a sequence of `context`."""

    @abstractmethod
    def state_bytes(self, context: int) -> int:
        """Bytes of the decoding state of one sequence after `context` tokens, in the dtype of the parameters."""


def linear_flops(*parameters: Tensor | None) -> float:
    """Forward operations a token of matrices that every token passes through once."""
    return float(sum(2 * parameter.numel() for parameter in parameters if parameter is not None))
