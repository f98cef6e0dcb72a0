"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236, idiap/fast-transformers).

    q, k, v = projections of x;  f(x) = elu(x) + 1
    S_t = S_{t-1} + v_t f(k_t)'    z_t = z_{t-1} + f(k_t)    out = out_proj(S_t f(q_t) / (z_t f(q_t)))

z is S's last row once a one is appended to the values, so that one sum without decay runs, and travels, for both.

Shapes: B batch, T local tokens, D model width, H heads, K head width, P = K + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...parallel import Constant, SequenceShard
from ..parameters import Linear, at_least_float32, normal
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops
from .dual import split_dual


class LinearAttentionOptions(MixerOptions):
    """Attention without a softmax.

    Attributes:
        heads: how many.
        eps: added to the denominator.
    """

    heads: int = Field(default=8, ge=1)
    eps: float = Field(default=1e-6, ge=0)

    def build(self, place: LayerPlace) -> LinearAttention:
        return LinearAttention(self, place)


class LinearAttention(Mixer):
    """Projections `q_proj`, `k_proj`, `v_proj`, `out_proj`, heads major in their features."""

    def __init__(self, options: LinearAttentionOptions, place: LayerPlace) -> None:
        super().__init__()
        width = place.width
        if width % options.heads:
            raise ValueError(
                f"linear_attention: width {width} is not divisible by {options.heads} heads; set linear_attention.heads"
            )
        self.heads, self.head_dim, self.eps = options.heads, width // options.heads, options.eps
        init, out_init = normal(place.init_std), normal(place.init_std / math.sqrt(2 * place.num_layers))
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, init) for _ in range(3))
        self.out_proj = Linear(width, width, out_init)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        return self.attend(x_BTD, shard)[0]

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        y_BTD, leaving = self.attend(x_BTD, shard, state["sums"])
        return y_BTD, {"sums": leaving()}

    def attend(
        self, x_BTD: Tensor, shard: SequenceShard, initial_BHPK: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """(out, what gives S over z after this shard's last token), given those before the sequence."""
        q_BTHK, k_BTHK, v_BTHP = self.project(x_BTD)
        decay_BTH = q_BTHK.new_zeros(q_BTHK.shape[:3])
        undiminished = Constant(decay_BTH.new_zeros(1), shard.reset_mask(x_BTD.device))
        y_BTHP, leaving = split_dual(v_BTHP, decay_BTH, k_BTHK, q_BTHK, undiminished, shard, initial_BHPK)
        return self.out_proj(self.ratio(y_BTHP).to(x_BTD.dtype)), leaving

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(q), f(k) (..., H, K) and [v, 1] (..., H, P), in float32 or better: a ratio of sums cancels badly."""
        q_BTHK, k_BTHK, v_BTHK = (
            at_least_float32(projection(x_BTD)).unflatten(-1, (self.heads, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return F.elu(q_BTHK) + 1, F.elu(k_BTHK) + 1, F.pad(v_BTHK, (0, 1), value=1.0)

    def ratio(self, y_BTHP: Tensor) -> Tensor:
        """(..., H K), heads side by side."""
        return (y_BTHP[..., :-1] / (y_BTHP[..., -1:] + self.eps)).flatten(-2)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch, self.heads, self.head_dim + 1, self.head_dim)
        return {"sums": torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32))}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        q_BHK, k_BHK, v_BHP = self.project(x_BD)
        sums_BHPK = state["sums"] + v_BHP.unsqueeze(-1) * k_BHK.unsqueeze(-2)
        y_BHP = (sums_BHPK * q_BHK.unsqueeze(-2)).sum(dim=-1)
        return self.out_proj(self.ratio(y_BHP).to(x_BD.dtype)), {"sums": sums_BHPK}

    def flops_per_token(self, context: int) -> float:
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        # an element of S is fed (a product, a sum) and read (a product, a sum); one of z is fed without a product
        state = self.heads * (4.0 * self.head_dim**2 + 3.0 * self.head_dim)
        return linear_flops(*(matrix.weight for matrix in matrices)) + state
