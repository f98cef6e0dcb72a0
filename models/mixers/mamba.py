"""Mamba's mixer: a selective state space behind a short convolution (Gu and Dao, arXiv 2312.00752, state-spaces/mamba).

    x, z = in_proj(u);  x = SiLU(conv(x));  delta, B, C = x_proj(x);  delta = softplus(dt_proj(delta))
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t h_t + D x_t        out = out_proj(y * SiLU(z))

Split along the sequence: the convolution takes a halo; each shard scans from zero and `prefix_state` gives the state
that really enters it, whose contribution is added in place, before the gate. What travels, while the gate is projected,
is one state and one sum of step sizes a channel, whatever the length. With `inner_norms` it is Jamba's mixer (arXiv
2403.19887): RMS norms on delta, B and C.

Shapes: B batch, T local tokens, D model width, C inner channels, N state size, R rank of delta, W convolution width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels import begin_selective_scan, selective_scan, short_convolution, swiglu
from ...parallel import PerChannel, SequenceShard, begin_prefix_state, projected_halo
from ..parameters import Initialiser, Linear, RMSNorm, at_least_float32, constant, fan_in_uniform, log_uniform, uniform
from .base import LayerPlace, Mixer, MixerOptions, State, convolve_token, linear_flops, window_after, window_before


class MambaOptions(MixerOptions):
    """A selective state space behind a short convolution.

    Attributes:
        state: size of the state of a channel.
        expand: inner channels for each of the width.
        conv: taps of the short convolution.
        dt_rank: rank of the projection to step sizes; by default width / 16, rounded up.
        dt_min: the smallest step size at first.
        dt_max: the largest step size at first.
        conv_bias: whether the short convolution has a bias.
        bias: whether the projections in and out have biases.
        inner_norms: norms on step sizes, B and C (Jamba).
    """

    state: int = Field(default=16, ge=1)
    expand: int = Field(default=2, ge=1)
    conv: int = Field(default=4, ge=2)
    dt_rank: int | None = Field(default=None, ge=1)
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)
    conv_bias: bool = True
    bias: bool = False
    inner_norms: bool = False

    def build(self, place: LayerPlace) -> Mamba:
        return Mamba(self, place)


class Mamba(Mixer):
    """Parameters as in the authors' code: `A_log` (C, N), `D` (C,), `conv_weight` (C, W), and four projections."""

    def __init__(self, options: MambaOptions, place: LayerPlace) -> None:
        super().__init__()
        width, channels, state = place.width, options.expand * place.width, options.state
        rank = options.dt_rank or math.ceil(width / 16)
        self.sizes = (rank, state, state)
        self.in_proj = Linear(width, 2 * channels, fan_in_uniform(), bias=options.bias)
        self.conv_weight = self.parameter("conv_weight", (channels, options.conv), fan_in_uniform())
        conv_bias_init = uniform(options.conv**-0.5)
        self.conv_bias = self.parameter("conv_bias", (channels,), conv_bias_init) if options.conv_bias else None
        self.x_proj = Linear(channels, sum(self.sizes), fan_in_uniform())
        step_sizes = log_uniform_step_sizes(options.dt_min, options.dt_max)
        self.dt_proj = Linear(rank, channels, uniform(rank**-0.5), bias=True, bias_init=step_sizes, half=False)
        self.A_log = self.parameter("A_log", (channels, state), log_integers, decay=False)
        self.D = self.parameter("D", (channels,), constant(1.0))
        self.out_proj = Linear(channels, width, fan_in_uniform(place.num_layers**-0.5), bias=options.bias)
        norms = [RMSNorm(size, place.norm_eps) for size in self.sizes] if options.inner_norms else []
        self.inner_norms = torch.nn.ModuleList(norms)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        u_BTC = self.project_input(x_BTD)
        before_BWC = projected_halo(self.project_input, x_BTD, self.conv_weight.shape[1] - 1, shard)
        return self.mix(x_BTD, u_BTC, before_BWC, shard)[0]

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        u_BTC = self.project_input(x_BTD)
        before_BWC = window_before(u_BTC, state["conv"], shard)
        y_BTD, leaving = self.mix(x_BTD, u_BTC, before_BWC, shard, state["scan"])
        return y_BTD, {"conv": window_after(before_BWC, u_BTC), "scan": leaving()}

    def project_input(self, x_BTD: Tensor) -> Tensor:
        """The first channels of `in_proj`, which are convolved and scanned."""
        return self._project(x_BTD, 0)

    def project_gate(self, x_BTD: Tensor) -> Tensor:
        """z, the other channels."""
        return self._project(x_BTD, 1)

    def _project(self, x_BTD: Tensor, half: int) -> Tensor:
        weight, bias = self.in_proj.weight.chunk(2)[half], self.in_proj.bias
        return F.linear(x_BTD, weight, None if bias is None else bias.chunk(2)[half])

    def mix(
        self,
        x_BTD: Tensor,
        u_BTC: Tensor,
        before_BWC: Tensor,
        shard: SequenceShard,
        initial_BCN: Tensor | None = None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """(out, what gives h after this shard's last token), given u before this shard and h before the sequence."""
        starts_BT = shard.start_mask(u_BTC.device)
        u_BTC = short_convolution(
            u_BTC, self.conv_weight, self.conv_bias, halo=before_BWC, activation="silu", document_starts=starts_BT
        )
        delta_BTC, B_BTN, C_BTN = self.select(u_BTC)
        A_CN = self.rates()
        tensors = u_BTC, delta_BTC, A_CN, B_BTN, C_BTN
        options = {"D": self.D, "delta_softplus": True, "document_starts": starts_BT}
        if shard.size == 1:
            y_BTC, leaving_BCN = selective_scan(*tensors, initial_state=initial_BCN, **options)
            return self.output(y_BTC, self.project_gate(x_BTD)), lambda: leaving_BCN
        scan = begin_selective_scan(*tensors, **options)
        # without a gradient of its own: that of the leaving state says all; see ScanStages
        transition = PerChannel(A_CN.detach(), scan.steps, shard.reset_mask(u_BTC.device))
        pending = begin_prefix_state(transition, scan.leaving, shard, initial=initial_BCN)
        z_BTC = self.project_gate(x_BTD)  # while the state travels
        entering_BCN = pending.wait()
        out_BTD = self.output(scan.finish(entering_BCN), z_BTC)
        return out_BTD, lambda: transition.after(entering_BCN, scan.leaving, shard.local_length)

    def output(self, y: Tensor, z: Tensor) -> Tensor:
        """The gate, and back to the model's width."""
        return self.out_proj(swiglu(z, y.to(z.dtype)))

    def rates(self) -> Tensor:
        """A (C, N), negative, in float32 or better: half types would move the slow decays by percents."""
        return -torch.exp(at_least_float32(self.A_log))

    def select(self, u_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the token: step sizes (..., C) before softplus, in float32 or better; B and C (..., N)."""
        selected = self.x_proj(u_BTC).split(self.sizes, dim=-1)
        if self.inner_norms:
            selected = [norm(part) for norm, part in zip(self.inner_norms, selected, strict=True)]
        delta_BTR, B_BTN, C_BTN = selected
        return at_least_float32(self.dt_proj(delta_BTR)), B_BTN, C_BTN

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        channels, width = self.conv_weight.shape
        state_dtype = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, width - 1, channels, device=device, dtype=dtype),
            "scan": torch.zeros(batch, *self.A_log.shape, device=device, dtype=state_dtype),
        }

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        u_BC, z_BC = self.in_proj(x_BD).chunk(2, dim=-1)
        u_BC, conv_BWC = convolve_token(u_BC, state["conv"], self.conv_weight, self.conv_bias)
        u_BC = F.silu(u_BC)
        delta_BC, B_BN, C_BN = self.select(u_BC)
        delta_BC = F.softplus(delta_BC)
        decay_BCN = torch.exp(delta_BC.unsqueeze(-1) * self.rates())
        h_BCN = decay_BCN * state["scan"] + (delta_BC * u_BC).unsqueeze(-1) * B_BN.unsqueeze(1)
        y_BC = (h_BCN * C_BN.unsqueeze(1)).sum(dim=-1) + self.D * u_BC
        return self.output(y_BC, z_BC), {"conv": conv_BWC, "scan": h_BCN}

    def flops_per_token(self, context: int) -> float:
        matrices = (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)
        # a state element is decayed (delta A, a product), fed (a product, a sum) and read (a product, a sum)
        scan = 6.0 * self.A_log.numel()
        return linear_flops(*(matrix.weight for matrix in matrices), self.conv_weight) + scan


def log_integers(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """log(1), ..., log(N) in every row: S4D-Real's decay rates."""
    return torch.arange(1, shape[-1] + 1, dtype=torch.float32).log().expand(*shape).clone()


def log_uniform_step_sizes(smallest: float, largest: float) -> Initialiser:
    """Biases whose softplus is log-uniform in [smallest, largest].

    The authors' code raises what is below 1e-4 to that; here `smallest` means what it says.
    """
    logarithms = log_uniform(smallest, largest)

    def init(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        step = torch.exp(logarithms(shape, generator))
        return step + torch.log(-torch.expm1(-step))

    return init
