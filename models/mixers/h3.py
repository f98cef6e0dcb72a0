"""H3: two state spaces between gates, after the pattern of linear attention (Fu et al., arXiv 2212.14052, safari).

    q, k, v = projections of x;  k = shift(k) + D_k k;  S = diag(k v') + D k v';  y = q' S;  out = out_proj(y)

The shift state space remembers the last N inputs: as a filter, its taps are sum_n B_n C_{n+j}, j < N, and shards need a
halo of N - 1 tokens of k. The diagonal one is S4D's with the bilinear rule; between shards its state travels, while q
is projected and most of the convolution computed. v k' is taken within heads of head_dim channels (1 in the released
models, a product of k and v), whose elements share one diagonal state space.

Shapes: B batch, T local tokens, D model width, H heads, K head width, N state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels import long_convolution
from ...kernels.autograd import own_precision
from ...parallel import FiniteFilter, ModalFilter, SequenceShard, begin_convolve, convolve
from ..parameters import Linear, at_least_float32, normal, uniform
from .base import LayerPlace, Mixer, MixerOptions, State, convolve_token, linear_flops, window_before
from .modal import modal_prefill, modal_step
from .s4d import DiagonalStateSpace, Discretisation, S4DOptions


class H3Options(MixerOptions):
    """Two state spaces between gates.

    Attributes:
        state: size of the state of the diagonal state space of a channel, even.
        shift: taps of the shift state space.
        head_dim: channels of a head, within which keys and values are multiplied.
        discretisation: how the diagonal state space is sampled.
        dt_min: the smallest step size at first.
        dt_max: the largest step size at first.
    """

    state: int = Field(default=64, ge=2, multiple_of=2)
    shift: int = Field(default=64, ge=1)
    head_dim: int = Field(default=1, ge=1)
    discretisation: Discretisation = "bilinear"
    dt_min: float = Field(default=1e-3, gt=0)
    dt_max: float = Field(default=1e-1, gt=0)

    def build(self, place: LayerPlace) -> H3:
        return H3(self, place)


class H3(Mixer):
    """Projections with biases; `shift_B`, `shift_C` (D, N) and `shift_D` (D,); `ssm`, of H channels, and `D` (H,)."""

    def __init__(self, options: H3Options, place: LayerPlace) -> None:
        super().__init__()
        width, self.head_dim = place.width, options.head_dim
        if width % options.head_dim:
            raise ValueError(f"h3: width {width} is not divisible by h3.head_dim {options.head_dim}; use a divisor")
        self.heads, shift = width // options.head_dim, (width, options.shift)
        init = normal(place.init_std)
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, init, bias=True) for _ in range(3))
        # not smaller in deeper models: the authors' rule for that does not reach `output_linear`, and recall needs it
        self.out_proj = Linear(width, width, init, bias=True)
        self.shift_B = self.parameter("shift_B", shift, first_unit_vector, decay=False)
        self.shift_C = self.parameter("shift_C", shift, uniform(options.shift**-0.5))
        self.shift_D = self.parameter("shift_D", (width,), normal(1.0))
        names = {"state", "discretisation", "dt_min", "dt_max"}
        self.ssm = DiagonalStateSpace(self.heads, S4DOptions(**options.model_dump(include=names)))
        self.D = self.parameter("D", (self.heads,), normal(1.0))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        shift = FiniteFilter(self.shift_taps())
        k_BTD = convolve(self.k_proj(x_BTD), shift, shard, skip=at_least_float32(self.shift_D))
        kv_BTE = self.outer(k_BTD.to(x_BTD.dtype), self.v_proj(x_BTD))
        log_poles_EN, residues_EN, skip_E = self.modes()
        finish = begin_convolve(kv_BTE, ModalFilter(log_poles_EN, residues_EN), shard, skip=skip_E)
        q_BTD = self.q_proj(x_BTD)
        return self.out_proj(self.read(q_BTD, finish()).to(x_BTD.dtype))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        length, k_BTD = x_BTD.shape[1], self.k_proj(x_BTD)
        window_BND = torch.cat([window_before(k_BTD, state["shift"], shard), k_BTD], dim=1)
        shifted_BND = long_convolution(window_BND, self.shift_taps(), skip=at_least_float32(self.shift_D))
        kv_BTE = self.outer(shifted_BND[:, -length:].to(x_BTD.dtype), self.v_proj(x_BTD))
        s_BTE, state_BEN = modal_prefill(kv_BTE, state["ssm"], *self.modes(), shard)
        y_BTD = self.out_proj(self.read(self.q_proj(x_BTD), s_BTE).to(x_BTD.dtype))
        return y_BTD, {"shift": window_BND[:, length:], "ssm": state_BEN}

    def outer(self, k_BTD: Tensor, v_BTD: Tensor) -> Tensor:
        """k v' within each head, (..., H K K) flat."""
        k_BTHK, v_BTHK = (part.unflatten(-1, (self.heads, self.head_dim)) for part in (k_BTD, v_BTD))
        return (k_BTHK.unsqueeze(-1) * v_BTHK.unsqueeze(-2)).flatten(-3)

    def read(self, q_BTD: Tensor, s_BTE: Tensor) -> Tensor:
        """q' S within each head, heads side by side again."""
        q_BTHK = q_BTD.unflatten(-1, (self.heads, self.head_dim))
        s_BTHKK = s_BTE.unflatten(-1, (self.heads, self.head_dim, self.head_dim))
        return (q_BTHK.unsqueeze(-1) * s_BTHKK).sum(dim=-2).flatten(-2)

    @own_precision
    def shift_taps(self) -> Tensor:
        """(D, N): sum_n B_n C_{n+j} at lag j."""
        B_DN, C_DN = at_least_float32(self.shift_B), at_least_float32(self.shift_C)
        taps = C_DN.shape[1]
        return torch.einsum("dn,djn->dj", B_DN, F.pad(C_DN, (0, taps - 1)).unfold(1, taps, 1))

    def modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Poles, residues and direct term of the diagonal state spaces, for each element of k v'."""
        log_poles, residues = self.ssm.discrete()
        elements = self.head_dim**2
        parts = [part.repeat_interleave(elements, dim=0) for part in (log_poles, residues, at_least_float32(self.D))]
        return parts[0], parts[1], parts[2]

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        channels, taps = self.shift_C.shape
        shape = (batch, self.heads * self.head_dim**2, self.ssm.modes)
        return {
            "shift": torch.zeros(batch, taps - 1, channels, device=device, dtype=dtype),
            "ssm": torch.zeros(shape, device=device, dtype=self.ssm.state_dtype),
        }

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        k_BD = self.k_proj(x_BD)
        shifted_BD, shift_BND = convolve_token(k_BD, state["shift"], self.shift_taps().flip(1).to(x_BD.dtype))
        k_BD = shifted_BD + self.shift_D * k_BD
        s_BE, state_BEN = modal_step(self.outer(k_BD, self.v_proj(x_BD)), state["ssm"], *self.modes())
        y_BD = self.out_proj(self.read(self.q_proj(x_BD), s_BE).to(x_BD.dtype))
        return y_BD, {"shift": shift_BND, "ssm": state_BEN}

    def flops_per_token(self, context: int) -> float:
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        # an element of k v' is a product, goes through its modes, and is read (a product, a sum)
        elements = self.head_dim**2 * (self.ssm.flops() + 3.0 * self.heads)
        return linear_flops(*(matrix.weight for matrix in matrices), self.shift_C) + elements


def first_unit_vector(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """1 in the first column: the shift begins as a plain filter whose taps are C."""
    B = torch.zeros(tuple(shape))
    B[:, 0] = 1
    return B
