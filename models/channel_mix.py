"""RWKV's channel mix, a feed-forward layer that looks one token back.

    k = W_k lerp(x_{t-1}, x_t, mix_key)          out = sigmoid(W_r lerp(x_{t-1}, x_t, mix_receptance)) * W_v relu(k)^2

RWKV-4 (Peng et al., arXiv 2305.13048) as written; RWKV-7 (arXiv 2503.14456) leaves the receptance gate out. Split
along the sequence, one token crosses each boundary.

Shapes: B batch, T local tokens, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..parallel import SequenceShard
from .feed_forward import FeedForward, FeedForwardOptions
from .mixers.base import LayerPlace, State, linear_flops, window_before
from .parameters import Initialiser, Linear, constant, fan_in_uniform, orthogonal
from .token_shift import token_shift


class ChannelMixOptions(FeedForwardOptions):
    """RWKV's channel mix.

    Attributes:
        hidden: hidden width; by default 4 x width.
        receptance: whether there is the gate of RWKV-4; RWKV-7 has none.
    """

    hidden: int | None = Field(default=None, ge=1)
    receptance: bool = True

    def build(self, place: LayerPlace) -> ChannelMix:
        return ChannelMix(self, place)


class ChannelMix(FeedForward):
    """`mix_key` and `mix_receptance` (D,) weigh the current token against the one before it."""

    def __init__(self, options: ChannelMixOptions, place: LayerPlace) -> None:
        super().__init__()
        width, hidden = place.width, options.hidden or 4 * place.width
        remaining = 1 - place.index / place.num_layers
        mix = channel_powers(remaining if options.receptance else remaining**4)
        self.mix_key = self.parameter("mix_key", (width,), mix, half=True)
        self.key = Linear(width, hidden, orthogonal() if options.receptance else fan_in_uniform(0.5))
        self.value = Linear(hidden, width, constant(0.0))
        gated = options.receptance
        self.mix_receptance = self.parameter("mix_receptance", (width,), mix, half=True) if gated else None
        self.receptance = Linear(width, width, constant(0.0)) if gated else None

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> tuple[Tensor, None]:
        return self.mix(x_BTD, token_shift(x_BTD, shard)), None

    def mix(self, x_BTD: Tensor, before_BTD: Tensor) -> Tensor:
        """The layer's output (..., D), given each token and the one before it."""
        y_BTD = self.value(F.relu(self.key(torch.lerp(before_BTD, x_BTD, self.mix_key))).square())
        if self.receptance is None or self.mix_receptance is None:
            return y_BTD
        return torch.sigmoid(self.receptance(torch.lerp(before_BTD, x_BTD, self.mix_receptance))) * y_BTD

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        return {"shift": torch.zeros(batch, len(self.mix_key), device=device, dtype=dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        return self.mix(x_BD, state["shift"]), {"shift": x_BD}

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        before_B1D = window_before(x_BTD, state["shift"].unsqueeze(1), shard)
        return self.mix(x_BTD, torch.cat([before_B1D, x_BTD[:, :-1]], dim=1)), {"shift": x_BTD[:, -1]}

    def flops_per_token(self) -> float:
        receptance = None if self.receptance is None else self.receptance.weight
        return linear_flops(self.key.weight, self.value.weight, receptance)


def channel_powers(exponent: float, offset: float = 0.0) -> Initialiser:
    """(i / D)^exponent + offset for channel i: later channels mix in less of the token before."""

    def init(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return (torch.arange(shape[0], dtype=torch.float32) / shape[0]).pow(exponent) + offset

    return init
