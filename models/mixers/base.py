"""What every mixer is: equations over a sequence of which this process holds a shard, and the same one token at a time.

A mixer never speaks to other processes; it hands the shard to the motions of `parallel` (halo, prefix_state,
convolve, causal_attention, ...). Each family is one file beside this one, with its options, and one line in
`models.registry`.

Shapes: B batch, T tokens of this shard, D model width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ...parallel import SequenceShard, halo
from ..parameters import ParameterModule

State = dict[str, Tensor]
"""What a layer remembers between tokens of one decoded batch. The first dimension is the batch, or 1 if rows share."""

Shared = dict[str, Tensor]
"""What the first layer of a family hands to its later layers of the same token, by family: (B, T, ...) or (B, ...).

In training also the streams of `noise.NOISE`, (B,), if some layer draws from them.
"""


@dataclass(frozen=True)
class LayerPlace:
    """Where in the model a layer stands: all that a layer may know of the model around it.

    Attributes:
        index: 0 for the first layer.
        first_of_family: no earlier layer has a mixer of the same family.
        norm_eps: for norms inside the layer.
        init_std: standard deviation of initial weights where the family says no better.
    """

    width: int
    index: int
    num_layers: int
    norm_eps: float
    init_std: float
    first_of_family: bool = True


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
    recomputable: bool = True
    """Whether the backward pass may compute it again; its activations are kept otherwise, whatever the config says."""
    noise: float = 0.0
    """Standard deviation of what it adds in training, drawn from the streams of `noise.NOISE`."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        """Outputs at this shard's tokens; every process of the sequence group calls it together."""

    @abstractmethod
    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token; `dtype` is that of the activations."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token later: (y_BD, the next state). Token by token this equals `forward` on one whole document."""

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        """`forward` on one document, and the state after this shard's last token, from which `step` goes on.

        `state` is the one before the sequence, the same on every process. This steps through all tokens up to this
        shard's last; families with a quicker way have their own.
        """
        y_BTD, state, _ = step_through(lambda x_BD, s, _: (*self.step(x_BD, s), {}), x_BTD, shard, state, {})
        return y_BTD, state

    def share(self, x_BTD: Tensor, shard: SequenceShard, shared: Shared) -> tuple[Tensor, Shared]:
        """`forward` within a model: the outputs, and what it adds to what layers share. Most families share nothing."""
        return self(x_BTD, shard), {}

    def share_step(self, x_BD: Tensor, state: State, shared: Shared) -> tuple[Tensor, State, Shared]:
        """`step` within a model."""
        return *self.step(x_BD, state), {}

    def share_prefill(
        self, x_BTD: Tensor, shard: SequenceShard, state: State, shared: Shared
    ) -> tuple[Tensor, State, Shared]:
        """`prefill` within a model."""
        if type(self).share_step is Mixer.share_step:
            return *self.prefill(x_BTD, shard, state), {}
        return step_through(self.share_step, x_BTD, shard, state, shared)

    def end_step(self) -> None:
        """After an optimiser step: what a layer adapts by other means than gradients. Every process calls it."""

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """Forward floating-point operations a token, mean over one sequence of `context` tokens.

        A real addition or multiplication is one operation: a multiply-add two, a complex product six. Counted are, as
        the family's equations say and whatever a kernel computes instead,

        - matrices, and the taps of short convolutions;
        - for every pair of tokens that may meet, its score and its part of the weighted sum;
        - for every element of a recurrent state, its decay, what is added to it and what is read from it; in a sum of
          modes the input's factor is taken into the output's;
        - a long convolution without such a state by three Fourier transforms, see `long_convolution_flops`, and the
          matrices that make its filter, once a sequence.

        Not counted are elementary functions (exp, softmax's and the like), what is done once to a channel (biases,
        norms, activations, gates, rotations, ratios, direct terms such as D x), what depends on parameters alone and
        does not grow with the sequence, and what a layer learns by other means than gradients.
        """

    def state_bytes(self, context: int) -> int:
        """Bytes of the decoding state of one sequence after `context` tokens, in the dtype of the parameters.

        Those of `init_state`; families whose state grows count for themselves.
        """
        return state_nbytes(self.init_state(1, torch.device("meta"), next(self.parameters()).dtype))


def state_nbytes(state: State) -> int:
    """Bytes of a state."""
    return sum(tensor.nbytes for tensor in state.values())


def step_through(
    step: Callable[[Tensor, State, Shared], tuple[Tensor, State, Shared]],
    x_BTD: Tensor,
    shard: SequenceShard,
    state: State,
    shared: Shared,
) -> tuple[Tensor, State, Shared]:
    """Outputs at this shard's tokens, the state after the last, and what they share, one token after the other."""
    x_BSD = tokens_so_far(x_BTD, shard)
    shared = {family: tokens_so_far(values, shard) for family, values in shared.items()}
    outputs: list[Tensor] = []
    additions: list[Shared] = []
    for token in range(x_BSD.shape[1]):
        y_BD, state, added = step(x_BSD[:, token], state, {name: values[:, token] for name, values in shared.items()})
        if token >= shard.start:
            outputs.append(y_BD)
            additions.append(added)
    added = {name: torch.stack([each[name] for each in additions], dim=1) for name in additions[0]}
    return torch.stack(outputs, dim=1), state, added


def tokens_so_far(x_BTD: Tensor, shard: SequenceShard) -> Tensor:
    """All tokens of the sequence up to this shard's last: (B, shard.stop, ...)."""
    if shard.size == 1:
        return x_BTD
    before_BWD = halo(x_BTD, shard.bounds[-2], shard)
    return torch.cat([before_BWD[:, before_BWD.shape[1] - shard.start :], x_BTD], dim=1)


def window_before(x_BTD: Tensor, carried_BWD: Tensor, shard: SequenceShard) -> Tensor:
    """The W tokens before this shard; those before the sequence are `carried_BWD`, from an earlier one."""
    width = carried_BWD.shape[1]
    before_BWD = halo(x_BTD, width, shard)
    if shard.start >= width:
        return before_BWD
    return torch.cat([carried_BWD[:, shard.start :], before_BWD[:, width - shard.start :]], dim=1)


def window_after(before_BWD: Tensor, x_BTD: Tensor) -> Tensor:
    """The last W tokens of this shard and of the W before it."""
    return torch.cat([before_BWD, x_BTD], dim=1)[:, x_BTD.shape[1] :]


def convolve_token(
    x_BD: Tensor, before_BWD: Tensor, weight_DW: Tensor, bias_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`short_convolution` of one token after the others that its taps reach; and those of the next token."""
    window_BWD = torch.cat([before_BWD, x_BD.unsqueeze(1)], dim=1)
    y_BD = torch.einsum("bwd,dw->bd", window_BWD, weight_DW)
    return y_BD if bias_D is None else y_BD + bias_D, window_BWD[:, 1:]


def long_convolution_flops(context: int) -> float:
    """Operations a token and channel of a convolution with a filter as long as the sequence.

    Transforms of the input, of the filter and back, each of n real numbers, twice the length, at 5/2 n log2 n
    operations, and n/2 + 1 complex products in between.
    """
    length = max(context, 1)
    return 3 * 2.5 * 2 * math.log2(2 * length) + 6 * (length + 1) / length


def linear_flops(*parameters: Tensor | None) -> float:
    """Forward operations a token of matrices that every token passes through once."""
    return float(sum(2 * parameter.numel() for parameter in parameters if parameter is not None))
