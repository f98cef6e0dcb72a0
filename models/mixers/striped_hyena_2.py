"""StripedHyena 2's operators, which make up Evo 2: SE, MR and LI (arXiv 2503.01868, Zymrael/savanna and vortex).

    q, k, v = conv3(in_proj(x));  y = out_proj(q * G(k * v))

    hyena_se  short, explicit       G u = h * u,          h of 7 taps
    hyena_mr  medium, regularised   G u = h * u + D u,    h of 128 taps, h_t = f_t exp(-alpha t / 127)
    hyena_li  long, implicit        G u = h * u + D u,    h_t = sum_n R_n exp(lambda_n t), 16 real modes

SE and MR need a halo as wide as their filters; LI is a diagonal recurrence whose state travels instead of the
full-length exchange that the authors' code makes. Groups of neighbouring channels share the filters of SE and MR.

Shapes: B batch, T local tokens, D channels, F groups of channels, K taps, N modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...kernels import short_convolution
from ...parallel import FiniteFilter, ModalFilter, SequenceShard, convolve
from ..parameters import Initialiser, at_least_float32, fan_in_uniform, normal
from .base import LayerPlace, convolve_token, window_after, window_before
from .gated_convolution import GatedConvolution, GatedConvolutionOptions
from .modal import modal_flops, modal_prefill, modal_step


class HyenaSEOptions(GatedConvolutionOptions):
    """Short explicit filters.

    Attributes:
        taps: of a filter.
        groups: of channels, each with one filter; by default every channel has its own.
    """

    taps: int = Field(default=7, ge=2)
    groups: int | None = Field(default=None, ge=1)

    def build(self, place: LayerPlace) -> HyenaSE:
        return HyenaSE(self, place, fan_in_uniform())


class HyenaMROptions(HyenaSEOptions):
    """Medium filters under a decay; see `HyenaSEOptions` for the others.

    Attributes:
        slowest: the least of the filters' decay rates, the greatest being 100.
    """

    taps: int = Field(default=128, ge=2)
    slowest: float = Field(default=1.0, gt=0)

    def build(self, place: LayerPlace) -> HyenaMR:
        return HyenaMR(self, place)


class HyenaLIOptions(GatedConvolutionOptions):
    """Long implicit filters.

    Attributes:
        modes: exponentials whose sum a filter is.
    """

    modes: int = Field(default=16, ge=1)

    def build(self, place: LayerPlace) -> HyenaLI:
        return HyenaLI(self, place)


class HyenaSE(GatedConvolution):
    """`taps` (F, K) by lag: the first multiplies the current token."""

    def __init__(self, options: HyenaSEOptions, place: LayerPlace, init: Initialiser) -> None:
        super().__init__(options, place)
        groups = options.groups or place.width
        if place.width % groups:
            raise ValueError(f"hyena: width {place.width} is not divisible by {groups} filter groups; use a divisor")
        self.taps = self.parameter("taps", (groups, options.taps), init)

    @property
    def skip(self) -> Tensor | None:
        """The direct term (D,); SE has none."""
        return None

    def filter(self) -> Tensor:
        """(D, K)"""
        taps_FK = at_least_float32(self.taps)
        return taps_FK.repeat_interleave(self.width // taps_FK.shape[0], dim=0)

    def convolution(self, u_BTD: Tensor, shard: SequenceShard) -> Tensor:
        return convolve(u_BTD, FiniteFilter(self.filter()), shard, skip=self.skip)

    def convolution_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, self.taps.shape[1] - 1, self.width, device=device, dtype=dtype)

    def convolution_prefill(self, u_BTD: Tensor, state: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
        before_BKD = window_before(u_BTD, state, shard)
        y_BTD = short_convolution(u_BTD, self.filter().flip(1), halo=before_BKD)
        y_BTD = y_BTD if self.skip is None else y_BTD + self.skip.to(u_BTD.dtype) * u_BTD
        return y_BTD, window_after(before_BKD, u_BTD)

    def convolution_step(self, u_BD: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y_BD, following_BKD = convolve_token(u_BD, state, self.filter().flip(1).to(u_BD.dtype))
        return y_BD if self.skip is None else y_BD + self.skip.to(u_BD.dtype) * u_BD, following_BKD

    def convolution_flops(self) -> float:
        return 2.0 * self.width * self.taps.shape[1]


class HyenaMR(HyenaSE):
    """`taps` (F, K), before the window; `D` (D,)."""

    def __init__(self, options: HyenaMROptions, place: LayerPlace) -> None:
        super().__init__(options, place, normal(1e-5 / math.sqrt(options.taps)))
        self.slowest = options.slowest
        self.D = self.parameter("D", (place.width,), normal(1.0))

    @property
    def skip(self) -> Tensor:
        return at_least_float32(self.D)

    def filter(self) -> Tensor:
        taps_DK = super().filter()
        window_FK = decaying_window(self.slowest, *self.taps.shape, device=taps_DK.device).to(taps_DK)
        return taps_DK * window_FK.repeat_interleave(len(taps_DK) // len(window_FK), dim=0)


class HyenaLI(GatedConvolution):
    """lambda = -exp(`log_rates`) and `residues` (D, N); `D` (D,). A rate so kept cannot grow."""

    def __init__(self, options: HyenaLIOptions, place: LayerPlace) -> None:
        super().__init__(options, place)
        shape = (place.width, options.modes)
        self.log_rates = self.parameter("log_rates", shape, slow_rates, decay=False)
        self.residues = self.parameter("residues", shape, normal(0.1 / math.sqrt(options.modes)), decay=False)
        self.D = self.parameter("D", (place.width,), normal(1.0))

    def modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of the poles, residues, direct term."""
        rates_DN = torch.exp(at_least_float32(self.log_rates))
        return -rates_DN, at_least_float32(self.residues), at_least_float32(self.D)

    def convolution(self, u_BTD: Tensor, shard: SequenceShard) -> Tensor:
        log_poles_DN, residues_DN, skip_D = self.modes()
        return convolve(u_BTD, ModalFilter(log_poles_DN, residues_DN), shard, skip=skip_D)

    def convolution_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        state_dtype = torch.promote_types(dtype, torch.float32)
        return torch.zeros(batch, *self.log_rates.shape, device=device, dtype=state_dtype)

    def convolution_prefill(self, u_BTD: Tensor, state: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
        return modal_prefill(u_BTD, state, *self.modes(), shard)

    def convolution_step(self, u_BD: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return modal_step(u_BD, state, *self.modes())

    def convolution_flops(self) -> float:
        return modal_flops(*self.log_rates.shape, is_complex=False)


def decaying_window(slowest: float, groups: int, taps: int, device: torch.device | None = None) -> Tensor:
    """(F, K), float64: exp(-alpha k / (K - 1)) at lag k, alpha from `slowest` to 100 over the groups."""
    alpha_F = torch.logspace(math.log10(slowest), 2, groups, dtype=torch.float64, device=device)
    return torch.exp(-alpha_F[:, None] * torch.linspace(0, 1, taps, dtype=torch.float64, device=device))


def slow_rates(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Logarithms of rates e^-1 times uniform numbers between 0.01 and 0.1."""
    return -1 + torch.log(0.01 + 0.09 * torch.rand(tuple(shape), generator=generator))
