"""S4: a structured state space for each channel (Gu et al., arXiv 2111.00396, state-spaces/s4).

    x'(t) = A x(t) + B u(t),  y(t) = 2 Re C x(t) + D u(t),  A = Lambda - P P*, begun as HiPPO-LegS; sampled:
    Abar = (2 / delta - A)^-1 (2 / delta + A)        Bbar = 2 (2 / delta - A)^-1 B
    x_t = Abar x_{t-1} + Bbar u_t,  y_t = 2 Re C x_t + D u_t;        out = GLU(out_proj(GELU(y)))

`init: random` begins with a random normal matrix minus a random P P* instead: the unstructured predecessor, whose
state remembers little, kept as negative control.

The filter K_l = C Abar^l Bbar is built from about sqrt(T) powers on either side, so that no length is built into the
parameters (the authors' kernel, a Cauchy sum and an inverse FFT, trains C (1 - Abar^L) of one L). Abar is never
diagonalised: LegS's eigenvectors are ill-conditioned beyond rescue, while Abar is a contraction, whose powers are safe.
Between shards the state travels, and Abar, which everyone has, is raised to the shard's length.

Shapes: B batch, T local tokens, D channels, N state (real numbers), M = N / 2 complex modes, one of each conjugate
pair; Q baby steps, G giant steps of Q tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels import long_convolution
from ...kernels.autograd import own_precision
from ...parallel import SequenceShard, Transition, begin_prefix_state
from ..parameters import Linear, at_least_float32, constant, fan_in_uniform, log_uniform, normal
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops, long_convolution_flops
from .hippo import legs_modes
from .modal import as_complex, complex_dtype
from .s4d import repeated


class S4Options(MixerOptions):
    """A structured state space for each channel.

    Attributes:
        state: size of the state of a channel, even: modes come in conjugate pairs.
        init: where A begins: HiPPO-LegS, or "random", the negative control.
        dt_min: the smallest step size at first.
        dt_max: the largest step size at first.
    """

    state: int = Field(default=64, ge=2, multiple_of=2)
    init: Literal["legs", "random"] = "legs"
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)

    def build(self, place: LayerPlace) -> S4:
        return S4(self, place)


@dataclass(frozen=True, eq=False)
class ConstantMatrix(Transition):
    """state_out = matrix^tokens state, the same known matrix at every token: nothing but the state travels.

    `matrix_DNN` against states (B, D, N).
    """

    matrix_DNN: Tensor
    reset_B: Tensor | None = None

    def travelling(self) -> None:
        return None

    def apply(self, travelling: Tensor | None, tokens: int, state: Tensor, *, transposed: bool = False) -> Tensor:
        power_DNN = torch.linalg.matrix_power(self.matrix_DNN, tokens)
        return times(power_DNN.mT if transposed else power_DNN, state)

    def sliced(self, part: slice, like: Tensor) -> ConstantMatrix:
        return replace(self, matrix_DNN=self.matrix_DNN[part])


class S4(Mixer):
    """Lambda = -exp(log_A_real) + i A_imag, P, B and C (D, M), the complex ones as pairs (D, M, 2); `D` (D,)."""

    def __init__(self, options: S4Options, place: LayerPlace) -> None:
        super().__init__()
        channels, modes = place.width, options.state // 2
        self.channels, self.modes = channels, modes
        # a standard normal complex number has variance 1/2 in each part
        gaussian = normal(math.sqrt(0.5))
        log_A_real, A_imag, P, B = constant(math.log(0.5)), random_frequencies, gaussian, gaussian
        if options.init == "legs":
            A_imag = repeated(lambda: legs_modes(options.state)[0].imag)
            P, B = repeated(lambda: legs_modes(options.state)[1]), repeated(lambda: legs_modes(options.state)[2])
        self.log_A_real = self.parameter("log_A_real", (channels, modes), log_A_real, decay=False)
        self.A_imag = self.parameter("A_imag", (channels, modes), A_imag, decay=False)
        self.P = self.parameter("P", (channels, modes, 2), P, decay=False)
        self.B = self.parameter("B", (channels, modes, 2), B, decay=False)
        self.C = self.parameter("C", (channels, modes, 2), gaussian)
        self.log_dt = self.parameter("log_dt", (channels,), log_uniform(options.dt_min, options.dt_max), decay=False)
        self.D = self.parameter("D", (channels,), normal(1.0))
        self.out_proj = Linear(channels, 2 * channels, fan_in_uniform(), bias=True)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        return self.output(self.read(x_BTD, shard, None)[0])

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        y_BTD, leaving_BDN = self.read(x_BTD, shard, torch.view_as_real(state["ssm"]).flatten(2))
        assert leaving_BDN is not None
        return self.output(y_BTD), {"ssm": as_complex(leaving_BDN.unflatten(2, (self.modes, 2)))}

    @own_precision
    def read(self, x_BTD: Tensor, shard: SequenceShard, initial_BDN: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """y (B, T, D); and, given the state before the sequence, the state after this shard's last token."""
        length, starts_BT = x_BTD.shape[1], shard.start_mask(x_BTD.device)
        squares, Bbar_DN, C_DN = self.discrete(length)
        baby, G = split_powers(length)
        Q = 2**baby
        inputs_DNQ = powers(squares, Bbar_DN, Q)
        giants = squares[baby:]
        outputs_DNG = powers([square.mT for square in giants], C_DN, G)
        transition, pending, leaving_BDN = ConstantMatrix(squares[0], shard.reset_mask(x_BTD.device)), None, None
        if shard.size > 1 or initial_BDN is not None:
            leaving_BDN = last_state(giants, inputs_DNQ, backwards(x_BTD, starts_BT).to(Bbar_DN.dtype), G)
            pending = begin_prefix_state(transition, leaving_BDN, shard, initial=initial_BDN)
        kernel_DT = torch.einsum("dng,dnq->dgq", outputs_DNG, inputs_DNQ).flatten(1)[:, :length]
        y_BTD = long_convolution(x_BTD, kernel_DT, skip=at_least_float32(self.D), document_starts=starts_BT)
        if pending is not None and leaving_BDN is not None:
            entering_BDN = pending.wait()
            if initial_BDN is not None:
                leaving_BDN = transition.after(entering_BDN, leaving_BDN, length)
            entering_BDNQ = powers(squares, times(squares[0], entering_BDN), Q)
            added_BDT = torch.einsum("dng,bdnq->bdgq", outputs_DNG, entering_BDNQ).flatten(2)[..., :length]
            y_BTD = y_BTD + before_documents(added_BDT.transpose(1, 2), starts_BT)
        return y_BTD.to(x_BTD.dtype), leaving_BDN

    def output(self, y_BTD: Tensor) -> Tensor:
        """Across the channels."""
        return F.glu(self.out_proj(F.gelu(y_BTD)), dim=-1)

    def discrete(self, length: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """Abar^(2^k) (D, N, N) for all 2^k below `length` or 1, Bbar (D, N), C (D, N), in real coordinates of x."""
        unit_NM = as_complex(torch.eye(2 * self.modes, device=self.C.device, dtype=self.dtype).view(-1, self.modes, 2))
        A, B, C = self.advance(unit_NM.unsqueeze(1)), self.advance(None), as_complex(at_least_float32(self.C))
        squares = [torch.view_as_real(A).flatten(2).permute(1, 2, 0)]
        while 2 ** len(squares) < length:
            squares.append(squares[-1] @ squares[-1])
        # 2 Re C x in coordinates (Re x, Im x)
        return squares, torch.view_as_real(B).flatten(1), 2 * torch.view_as_real(C.conj().resolve_conj()).flatten(1)

    def advance(self, x_BDM: Tensor | None) -> Tensor:
        """Abar x, or Bbar for None, in O(N): (2 / delta - A)^-1 by Woodbury's identity, A being diagonal minus P P*."""
        rate_D1 = 2 * torch.exp(-at_least_float32(self.log_dt)).unsqueeze(-1)
        A_DM = torch.complex(-torch.exp(at_least_float32(self.log_A_real)), at_least_float32(self.A_imag))
        P_DM = as_complex(at_least_float32(self.P))

        def project(v_BDM: Tensor) -> Tensor:
            """P* v, over both halves of the conjugate pairs."""
            return 2 * (P_DM.conj() * v_BDM).sum(dim=-1, keepdim=True).real

        if x_BDM is None:
            right = 2 * as_complex(at_least_float32(self.B))
        else:
            right = (rate_D1 + A_DM) * x_BDM - P_DM * project(x_BDM)
        right, P_inverse_DM = right / (rate_D1 - A_DM), P_DM / (rate_D1 - A_DM)
        return right - P_inverse_DM * (project(right) / (1 + project(P_inverse_DM)))

    @property
    def dtype(self) -> torch.dtype:
        """In which filter and states are computed: the parameters', but at least float32."""
        return torch.promote_types(self.C.dtype, torch.float32)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch, self.channels, self.modes)
        return {"ssm": torch.zeros(shape, device=device, dtype=complex_dtype(self.C.dtype))}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        state_BDM = self.advance(state["ssm"]) + self.advance(None) * x_BD.unsqueeze(-1)
        C_DM = as_complex(at_least_float32(self.C))
        y_BD = 2 * (C_DM * state_BDM).sum(dim=-1).real + self.D * x_BD
        return self.output(y_BD.to(x_BD.dtype)), {"ssm": state_BDM}

    def flops_per_token(self, context: int) -> float:
        length, N = max(context, 1), 2 * self.modes
        baby, giant = split_powers(length)
        # Abar is squared for each doubling; its powers are applied column by column, and each tap is a product of two
        squares = N**3 * max(0, math.ceil(math.log2(length)) - 1)
        columns = N**2 * (2**baby - 1 + 2 ** math.ceil(math.log2(giant)) - 1)
        filter = 2 * (squares + columns + N * 2**baby * giant) / length
        return linear_flops(self.out_proj.weight) + self.channels * (filter + long_convolution_flops(context))


def split_powers(length: int) -> tuple[int, int]:
    """log2 of the number of baby steps, and the number of giant steps, for `length` taps."""
    baby = math.ceil(math.log2(length) / 2)
    return baby, math.ceil(length / 2**baby)


def times(matrix_DNN: Tensor, vectors_BDN: Tensor) -> Tensor:
    """Each channel's matrix times its vectors."""
    return torch.einsum("dnm,bdm->bdn", matrix_DNN, vectors_BDN)


def powers(squares: list[Tensor], vector_DN: Tensor, count: int) -> Tensor:
    """A^k v for k < count, (..., D, N, count), doubling their number with each of `squares` = A, A^2, A^4, ..."""
    columns = vector_DN.unsqueeze(-1)
    for square in squares:
        if columns.shape[-1] >= count:
            break
        columns = torch.cat([columns, square @ columns], dim=-1)
    return columns[..., :count]


def last_state(giants: list[Tensor], inputs_DNQ: Tensor, backwards_BTD: Tensor, G: int) -> Tensor:
    """The state after the last token, sum over lags l of Abar^l Bbar u_l: (B, D, N).

    Args:
        giants: Abar^Q and its repeated squares.
        inputs_DNQ: Abar^q Bbar.
        backwards_BTD: inputs by lag, the last token's first.
    """
    Q = inputs_DNQ.shape[-1]
    lags_BGQD = F.pad(backwards_BTD, (0, 0, 0, G * Q - backwards_BTD.shape[1])).unflatten(1, (G, Q))
    states_BDNG = torch.einsum("dnq,bgqd->bdng", inputs_DNQ, lags_BGQD)
    for giant in giants:
        if states_BDNG.shape[-1] == 1:
            break
        states_BDNG = F.pad(states_BDNG, (0, states_BDNG.shape[-1] % 2))
        states_BDNG = states_BDNG[..., 0::2] + giant @ states_BDNG[..., 1::2]
    return states_BDNG.squeeze(-1)


def backwards(x_BTD: Tensor, starts_BT: Tensor | None) -> Tensor:
    """The tokens from last to first, zeros before the beginning of the last token's document."""
    x_BTD = x_BTD.flip(1)
    if starts_BT is None:
        return x_BTD
    starts_BT = starts_BT.flip(1)
    later_BT = starts_BT.cumsum(1) - starts_BT.to(torch.int64)
    return x_BTD.masked_fill((later_BT > 0).unsqueeze(-1), 0)


def before_documents(y_BTD: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Zeros from the first document start on, where an entering state is forgotten."""
    return y_BTD if starts_BT is None else y_BTD.masked_fill((starts_BT.cumsum(1) > 0).unsqueeze(-1), 0)


def random_frequencies(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """(D, M): the frequencies of random skew matrices (G - G') / 2, one for each channel."""
    channels, modes = shape
    G_DNN = torch.randn(channels, 2 * modes, 2 * modes, generator=generator, dtype=torch.float64)
    return torch.linalg.eigvalsh(-0.5j * (G_DNN - G_DNN.mT))[:, modes:].float()
