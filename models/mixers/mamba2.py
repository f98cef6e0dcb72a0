"""Mamba-2's mixer: a selective state space with one decay a head (Dao and Gu, arXiv 2405.21060, state-spaces/mamba).

    z, x, B, C, delta = in_proj(u);  x, B, C = SiLU(conv(x, B, C));  delta = softplus(delta + dt_bias);  a = -exp(A_log)
    S_t = exp(delta_t a) S_{t-1} + delta_t x_t B_t'     y_t = S_t C_t + D x_t     out = out_proj(norm(y * SiLU(z)))

The norm comes after the gate, and its mean is over the channels of each group. Split along the sequence: the
convolution takes a halo; a state and one sum of log-decays a head travel while each shard computes its own outputs.

Shapes: B batch, T local tokens, D model width, C inner channels, H heads, P head width (C = H P), G groups of heads
that share B and C, N state size, W convolution width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels import rms_norm, short_convolution
from ...parallel import PerHead, SequenceShard, projected_halo
from ..parameters import Linear, RMSNorm, at_least_float32, constant, fan_in_uniform, uniform
from .base import LayerPlace, Mixer, MixerOptions, State, convolve_token, linear_flops, window_after, window_before
from .dual import split_dual
from .mamba import log_uniform_step_sizes


class Mamba2Options(MixerOptions):
    """A selective state space with one decay a head.

    Attributes:
        state: size of the state of a channel.
        expand: inner channels for each of the width.
        head_dim: inner channels of a head.
        groups: of heads that share B and C.
        conv: taps of the short convolution.
        dt_min: the smallest step size at first.
        dt_max: the largest step size at first.
        conv_bias: whether the short convolution has a bias.
        bias: whether the projections in and out have biases.
    """

    state: int = Field(default=128, ge=1)
    expand: int = Field(default=2, ge=1)
    head_dim: int = Field(default=64, ge=1)
    groups: int = Field(default=1, ge=1)
    conv: int = Field(default=4, ge=2)
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)
    conv_bias: bool = True
    bias: bool = False

    def build(self, place: LayerPlace) -> Mamba2:
        return Mamba2(self, place)


class Mamba2(Mixer):
    """As in the authors' code: `in_proj` makes z, x, B, C, delta in this order; `dt_bias`, `A_log`, `D` (H,)."""

    def __init__(self, options: Mamba2Options, place: LayerPlace) -> None:
        super().__init__()
        width, self.channels, self.state = place.width, options.expand * place.width, options.state
        self.head_dim, self.groups = options.head_dim, options.groups
        if self.channels % options.head_dim:
            raise ValueError(
                f"mamba2: {self.channels} inner channels are not divisible by mamba2.head_dim {options.head_dim}; "
                "use a divisor"
            )
        self.heads = self.channels // options.head_dim
        if self.heads % options.groups:
            raise ValueError(
                f"mamba2: {self.heads} heads are not divisible by mamba2.groups {options.groups}; use a divisor"
            )
        convolved = self.channels + 2 * options.groups * options.state
        self.in_proj = Linear(width, self.channels + convolved + self.heads, fan_in_uniform(), bias=options.bias)
        self.conv_weight = self.parameter("conv_weight", (convolved, options.conv), fan_in_uniform())
        conv_bias_init = uniform(options.conv**-0.5)
        self.conv_bias = self.parameter("conv_bias", (convolved,), conv_bias_init) if options.conv_bias else None
        self.dt_bias = self.parameter("dt_bias", (self.heads,), log_uniform_step_sizes(options.dt_min, options.dt_max))
        self.A_log = self.parameter("A_log", (self.heads,), log_of_uniform)
        self.D = self.parameter("D", (self.heads,), constant(1.0))
        self.norm = RMSNorm(self.channels, place.norm_eps)
        self.out_proj = Linear(self.channels, width, fan_in_uniform(place.num_layers**-0.5), bias=options.bias)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        streams_BTM, delta_BTH = self.project_streams(x_BTD)
        taps = self.conv_weight.shape[1]
        before_BWM = projected_halo(lambda x: self.project_streams(x)[0], x_BTD, taps - 1, shard)
        return self.mix(x_BTD, streams_BTM, delta_BTH, before_BWM, shard)[0]

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        streams_BTM, delta_BTH = self.project_streams(x_BTD)
        before_BWM = window_before(streams_BTM, state["conv"], shard)
        y_BTD, leaving = self.mix(x_BTD, streams_BTM, delta_BTH, before_BWM, shard, state["ssm"])
        return y_BTD, {"conv": window_after(before_BWM, streams_BTM), "ssm": leaving()}

    def mix(
        self,
        x_BTD: Tensor,
        streams_BTM: Tensor,
        delta_BTH: Tensor,
        before_BWM: Tensor,
        shard: SequenceShard,
        initial_BHPN: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """(out, what gives S after this shard's last token), given the streams before this shard and the first S."""
        streams_BTM = short_convolution(
            streams_BTM,
            self.conv_weight,
            self.conv_bias,
            halo=before_BWM,
            activation="silu",
            document_starts=shard.start_mask(x_BTD.device),
        )
        x_BTHP, B_BTGN, C_BTGN = self.split(streams_BTM)
        delta_BTH, log_decay_BTH = self.select(delta_BTH)
        fed_BTHP = (x_BTHP * delta_BTH.unsqueeze(-1)).to(x_BTD.dtype)
        transition = PerHead(log_decay_BTH.sum(dim=1), shard.reset_mask(x_BTD.device))
        y_BTHP, leaving = split_dual(fed_BTHP, log_decay_BTH, B_BTGN, C_BTGN, transition, shard, initial_BHPN)
        y_BTHP = y_BTHP + self.D.unsqueeze(-1) * x_BTHP
        return self.output(y_BTHP.to(x_BTD.dtype), self.project_gate(x_BTD)), leaving

    def project_gate(self, x_BTD: Tensor) -> Tensor:
        """z, the first channels of `in_proj`."""
        weight, bias = self.in_proj.weight, self.in_proj.bias
        return F.linear(x_BTD, weight[: self.channels], None if bias is None else bias[: self.channels])

    def project_streams(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """x, B and C side by side, before the convolution, and delta: the other channels of `in_proj`."""
        weight, bias = self.in_proj.weight, self.in_proj.bias
        streams = F.linear(x_BTD, weight[self.channels :], None if bias is None else bias[self.channels :])
        convolved_BTM, delta_BTH = streams.split([self.conv_weight.shape[0], self.heads], dim=-1)
        return convolved_BTM, delta_BTH

    def split(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, P), B and C (..., G, N)."""
        shared = self.groups * self.state
        x, B, C = streams.split([self.channels, shared, shared], dim=-1)
        return (
            x.unflatten(-1, (self.heads, self.head_dim)),
            B.unflatten(-1, (self.groups, self.state)),
            C.unflatten(-1, (self.groups, self.state)),
        )

    def select(self, delta_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """Step sizes, positive, and delta a, both (..., H) in float32 or better."""
        delta_BTH = F.softplus(at_least_float32(delta_BTH) + at_least_float32(self.dt_bias))
        return delta_BTH, -torch.exp(at_least_float32(self.A_log)) * delta_BTH

    def output(self, y_BTHP: Tensor, z_BTC: Tensor) -> Tensor:
        """The gate, the norm of each group, and back to the model's width."""
        norm = self.norm
        return self.out_proj(rms_norm(y_BTHP.flatten(-2), norm.weight, norm.eps, gate=z_BTC, groups=self.groups))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        convolved, width = self.conv_weight.shape
        state_dtype = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, width - 1, convolved, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, self.heads, self.head_dim, self.state, device=device, dtype=state_dtype),
        }

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        streams_BM, delta_BH = self.project_streams(x_BD)
        streams_BM, conv_BWM = convolve_token(streams_BM, state["conv"], self.conv_weight, self.conv_bias)
        x_BHP, B_BGN, C_BGN = self.split(F.silu(streams_BM))
        B_BHN, C_BHN = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (B_BGN, C_BGN))
        delta_BH, log_decay_BH = self.select(delta_BH)
        fed_BHPN = (delta_BH.unsqueeze(-1) * x_BHP).unsqueeze(-1) * B_BHN.unsqueeze(-2)
        S_BHPN = torch.exp(log_decay_BH)[..., None, None] * state["ssm"] + fed_BHPN
        y_BHP = (S_BHPN * C_BHN.unsqueeze(-2)).sum(dim=-1) + self.D.unsqueeze(-1) * x_BHP
        y_BD = self.output(y_BHP.to(x_BD.dtype), self.project_gate(x_BD))
        return y_BD, {"conv": conv_BWM, "ssm": S_BHPN}

    def flops_per_token(self, context: int) -> float:
        # a state element is decayed (a product), fed (a product, a sum) and read (a product, a sum)
        scan = 5.0 * self.channels * self.state
        return linear_flops(self.in_proj.weight, self.out_proj.weight, self.conv_weight) + scan


def log_of_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """log U(1, 16): logarithms of decay rates, as the authors' code begins with."""
    return torch.log(1 + 15 * torch.rand(tuple(shape), generator=generator))
