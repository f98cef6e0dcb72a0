"""S4D: one diagonal state space for each channel (Gu et al., arXiv 2206.11893, state-spaces/s4, models/s4/s4d.py).

    x'(t) = A x(t) + B u(t),  y(t) = 2 Re C x(t) + D u(t),  sampled with step delta:
    zoh       Abar = exp(delta A)                             Bbar = (Abar - 1) / A B
    bilinear  Abar = (1 + delta A / 2) / (1 - delta A / 2)    Bbar = delta B / (1 - delta A / 2)
    x_t = Abar x_{t-1} + Bbar u_t,  y_t = 2 Re C x_t + D u_t;        out = GLU(out_proj(GELU(y)))

A is diagonal, complex in conjugate pairs of which one is kept (hence 2 Re); `real` has real modes instead. The same
decay at every token: a convolution by a sum of modes, and between shards only the state travels. The S4D that H3 is
compared with (HazyResearch/safari) has no GLU: `gated: false`.

Shapes: B batch, T local tokens, D channels, N state (real numbers), M modes: N / 2 complex or N real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...parallel import ModalFilter, SequenceShard, convolve
from ..parameters import Initialiser, Linear, ParameterModule, at_least_float32, fan_in_uniform, log_uniform, normal
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops
from .hippo import legs_modes
from .modal import as_complex, complex_dtype, modal_flops, modal_prefill, modal_step

Discretisation = Literal["zoh", "bilinear"]


class S4DOptions(MixerOptions):
    """A diagonal state space for each channel.

    Attributes:
        state: size of the state of a channel, even: modes come in conjugate pairs.
        gated: with a gated linear unit after it.
        init: where A begins.
        discretisation: how the state space is sampled: zero-order hold, or the bilinear rule.
        dt_min: the smallest step size at first.
        dt_max: the largest step size at first.
    """

    state: int = Field(default=64, ge=2, multiple_of=2)
    gated: bool = True
    init: Literal["lin", "inv", "quad", "legs", "real"] = "lin"
    discretisation: Discretisation = "zoh"
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)

    def build(self, place: LayerPlace) -> S4D:
        return S4D(self, place)


class DiagonalStateSpace(ParameterModule):
    """A, B, C and the step sizes of D channels; complex ones are kept as pairs (..., 2).

    A = -exp(log_A_real) + i A_imag cannot leave the stable half-plane.
    """

    def __init__(self, channels: int, options: S4DOptions) -> None:
        super().__init__()
        self.discretisation, self.is_complex = options.discretisation, options.init != "real"
        self.channels, self.modes = channels, options.state // (1 + self.is_complex)
        shape, pairs = (channels, self.modes), [2] * self.is_complex
        begin, state = INITIAL_MODES[options.init], options.state
        rates, turns = repeated(lambda: begin(state)[0].neg().log()), repeated(lambda: begin(state)[1])
        self.log_A_real = self.parameter("log_A_real", shape, rates, decay=False)
        self.A_imag = self.parameter("A_imag", shape, turns, decay=False) if self.is_complex else None
        self.B = self.parameter("B", (*shape, *pairs), repeated(lambda: begin(state)[2]), decay=False)
        # a standard normal complex number has variance 1/2 in each part
        self.C = self.parameter("C", (*shape, *pairs), normal(math.sqrt(0.5) if pairs else 1.0))
        log_dt = log_uniform(options.dt_min, options.dt_max)
        self.log_dt = self.parameter("log_dt", (channels,), log_dt, decay=False)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """log Abar and 2 C Bbar, (D, M): the poles of the sampled system and their residues."""
        A_DM, B_DM, C_DM = self.continuous()
        dt_D1 = torch.exp(at_least_float32(self.log_dt)).unsqueeze(-1)
        if self.discretisation == "zoh":
            log_poles_DM = dt_D1 * A_DM
            # expm1, not exp - 1: A delta is small in the slow modes
            Bbar_DM = torch.expm1(log_poles_DM) / A_DM * B_DM
        else:
            half_DM = dt_D1 * A_DM / 2
            # a fast real mode overshoots: its pole is negative, and the logarithm complex
            forward_DM, backward_DM = (1 + half_DM).to(complex_dtype(half_DM.dtype)), 1 - half_DM
            log_poles_DM = torch.log(forward_DM) - torch.log(backward_DM)
            Bbar_DM = dt_D1 * B_DM / backward_DM
        pair = 2 if self.is_complex else 1
        return log_poles_DM, (pair * C_DM * Bbar_DM).to(log_poles_DM.dtype)

    def continuous(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and C (D, M)."""
        real_DM = -torch.exp(at_least_float32(self.log_A_real))
        B, C = at_least_float32(self.B), at_least_float32(self.C)
        if self.A_imag is None:
            return real_DM, B, C
        return torch.complex(real_DM, at_least_float32(self.A_imag)), as_complex(B), as_complex(C)

    @property
    def state_dtype(self) -> torch.dtype:
        """Of `discrete`, and of the state."""
        is_complex = self.is_complex or self.discretisation == "bilinear"
        return complex_dtype(self.C.dtype) if is_complex else torch.promote_types(self.C.dtype, torch.float32)

    def flops(self) -> float:
        """Operations of the recurrence a token."""
        return modal_flops(self.channels, self.modes, is_complex=self.state_dtype.is_complex)


class S4D(Mixer):
    """`ssm`: the state spaces; `D` (D,): the direct term; `out_proj`: to twice the width if a GLU follows."""

    def __init__(self, options: S4DOptions, place: LayerPlace) -> None:
        super().__init__()
        self.ssm, self.gated = DiagonalStateSpace(place.width, options), options.gated
        self.D = self.parameter("D", (place.width,), normal(1.0))
        self.out_proj = Linear(place.width, (1 + self.gated) * place.width, fan_in_uniform(), bias=True)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        y_BTD = convolve(x_BTD, ModalFilter(*self.ssm.discrete()), shard, skip=at_least_float32(self.D))
        return self.output(y_BTD.to(x_BTD.dtype))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        y_BTD, state_BDM = modal_prefill(x_BTD, state["ssm"], *self.ssm.discrete(), at_least_float32(self.D), shard)
        return self.output(y_BTD.to(x_BTD.dtype)), {"ssm": state_BDM}

    def output(self, y_BTD: Tensor) -> Tensor:
        """Across the channels."""
        out = self.out_proj(F.gelu(y_BTD))
        return F.glu(out, dim=-1) if self.gated else out

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch, self.ssm.channels, self.ssm.modes)
        return {"ssm": torch.zeros(shape, device=device, dtype=self.ssm.state_dtype)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BD, state_BDM = modal_step(x_BD, state["ssm"], *self.ssm.discrete(), at_least_float32(self.D))
        return self.output(y_BD.to(x_BD.dtype)), {"ssm": state_BDM}

    def flops_per_token(self, context: int) -> float:
        return linear_flops(self.out_proj.weight) + self.ssm.flops()


def lin(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real and imaginary part of A, and B, (M,): A = -1/2 + i pi n, a damped Fourier series."""
    n = torch.arange(state // 2, dtype=torch.float64)
    return torch.full_like(n, -0.5), math.pi * n, torch.ones_like(n, dtype=torch.complex128)


def inv(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """A = -1/2 + i N / pi (N / (2n + 1) - 1): LegS's frequencies, approximately."""
    real, _, B = lin(state)
    n = torch.arange(state // 2, dtype=torch.float64)
    return real, state / math.pi * (state / (2 * n + 1) - 1), B


def quad(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """A = -1/2 + i (2n + 1)^2 / pi."""
    real, _, B = lin(state)
    n = torch.arange(state // 2, dtype=torch.float64)
    return real, (2 * n + 1).square() / math.pi, B


def legs(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonal of HiPPO-LegS in its normal form, and its B."""
    A, _, B = legs_modes(state)
    return A.real, A.imag, B


def real(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """A = -(n + 1), n < N."""
    n = torch.arange(state, dtype=torch.float64)
    return -(n + 1), torch.zeros_like(n), torch.ones_like(n)


INITIAL_MODES: dict[str, Callable[[int], tuple[Tensor, Tensor, Tensor]]] = {
    "lin": lin,
    "inv": inv,
    "quad": quad,
    "legs": legs,
    "real": real,
}


def repeated(values: Callable[[], Tensor]) -> Initialiser:
    """The same values for every channel, complex ones as pairs; made only when asked for."""

    def init(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        made = values()
        return (torch.view_as_real(made) if made.is_complex() else made).float().expand(*shape).clone()

    return init
