"""What StripedHyena's and StripedHyena 2's operators share (arXiv 2503.01868, togethercomputer/stripedhyena, savanna).

    q, k, v = conv3(in_proj(x));  y = out_proj(q * G(k * v))

G is a causal convolution of each channel with itself; each operator is a G. The three streams lie in the channels
interleaved (StripedHyena 2) or head by head (StripedHyena-7B).

Shapes: B batch, T local tokens, D model width, W width of the short convolution.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from ...kernels import short_convolution
from ...parallel import SequenceShard, projected_halo
from ..parameters import Linear, fan_in_uniform, normal, uniform
from .base import LayerPlace, Mixer, MixerOptions, State, convolve_token, linear_flops, window_after, window_before


class GatedConvolutionOptions(MixerOptions):
    """What the operators of both StripedHyenas have.

    Attributes:
        conv: taps of the short convolution before the gates.
    """

    conv: int = Field(default=3, ge=2)


class GatedConvolution(Mixer):
    """`in_proj` (3 D, D), `conv_weight` (3 D, W), `out_proj` with bias; subclasses add G."""

    biased = False
    """Whether `in_proj` and the short convolution have biases."""

    def __init__(self, options: GatedConvolutionOptions, place: LayerPlace) -> None:
        super().__init__()
        self.width, streams = place.width, 3 * place.width
        self.in_proj = Linear(place.width, streams, normal(place.init_std), bias=self.biased)
        self.conv_weight = self.parameter("conv_weight", (streams, options.conv), fan_in_uniform())
        conv_bias_init = uniform(options.conv**-0.5)
        self.conv_bias = self.parameter("conv_bias", (streams,), conv_bias_init) if self.biased else None
        out_init = normal(place.init_std / math.sqrt(2 * place.num_layers))
        self.out_proj = Linear(place.width, place.width, out_init, bias=True)

    @abstractmethod
    def convolution(self, u_BTD: Tensor, shard: SequenceShard) -> Tensor:
        """G."""

    @abstractmethod
    def convolution_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """G's state before the first token."""

    @abstractmethod
    def convolution_step(self, u_BD: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """G, one token later."""

    @abstractmethod
    def convolution_prefill(self, u_BTD: Tensor, state: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
        """G of one document after `state`, the same on every process, and the state after this shard's last token."""

    @abstractmethod
    def convolution_flops(self) -> float:
        """G's operations a token."""

    def split(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., 3 D) to q, k and v: channels 0, 3, 6, ... are q."""
        q, k, v = streams.unflatten(-1, (self.width, 3)).unbind(-1)
        return q, k, v

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        streams_BTM = self.in_proj(x_BTD)
        streams_BTM = short_convolution(
            streams_BTM,
            self.conv_weight,
            self.conv_bias,
            halo=projected_halo(self.in_proj, x_BTD, self.conv_weight.shape[1] - 1, shard),
            document_starts=shard.start_mask(x_BTD.device),
        )
        q_BTD, k_BTD, v_BTD = self.split(streams_BTM)
        return self.out_proj((q_BTD * self.convolution(k_BTD * v_BTD, shard)).to(x_BTD.dtype))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        streams_BTM = self.in_proj(x_BTD)
        before_BWM = window_before(streams_BTM, state["short"], shard)
        q_BTD, k_BTD, v_BTD = self.split(
            short_convolution(streams_BTM, self.conv_weight, self.conv_bias, halo=before_BWM)
        )
        y_BTD, long = self.convolution_prefill(k_BTD * v_BTD, state["long"], shard)
        short_BWM = window_after(before_BWM, streams_BTM)
        return self.out_proj((q_BTD * y_BTD).to(x_BTD.dtype)), {"short": short_BWM, "long": long}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        streams, window = self.conv_weight.shape
        short = torch.zeros(batch, window - 1, streams, device=device, dtype=dtype)
        return {"short": short, "long": self.convolution_state(batch, device, dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        streams_BM, short_BWM = convolve_token(self.in_proj(x_BD), state["short"], self.conv_weight, self.conv_bias)
        q_BD, k_BD, v_BD = self.split(streams_BM)
        y_BD, long = self.convolution_step(k_BD * v_BD, state["long"])
        return self.out_proj((q_BD * y_BD).to(x_BD.dtype)), {"short": short_BWM, "long": long}

    def flops_per_token(self, context: int) -> float:
        matrices = linear_flops(self.in_proj.weight, self.conv_weight, self.out_proj.weight)
        return matrices + self.convolution_flops()
