"""Retention: linear attention with fixed decays and rotary positions (Sun et al., arXiv 2307.08621, torchscale).

    q, k, v, g = projections of x, q and k / sqrt(K) rotated by their positions
    S_t = gamma S_{t-1} + v_t k_t'        o_t = S_t q_t        out = out_proj(SiLU(g) * norm(o)), the norm head by head

The same decay at every token: between shards only the state travels, while each computes its own outputs. The
rotation is by GLOBAL positions. The paper divides scores by factors that depend on head and position; the norm cancels
them but for its epsilon, and they are left out, as they would tie outputs to how the sequence is cut.

Shapes: B batch, T local tokens, D model width, H heads, K key width and P value width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels import rms_norm, rotary
from ...parallel import Constant, SequenceShard
from ..parameters import Initialiser, Linear, at_least_float32
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops
from .dual import split_dual


class RetNetOptions(MixerOptions):
    """Linear attention with fixed decays.

    Attributes:
        heads: how many, each with its decay.
        expand: channels of the values for each of the width.
        decay: of head h: 1 - 2^-(5 + h) for "powers", as in the paper's text and torchscale; 1 - exp(linspace(log 1/32,
            log 1/512)) for "linspace", as in the paper's experiments.
        eps: of the heads' norm.
    """

    heads: int = Field(default=8, ge=1)
    expand: int = Field(default=2, ge=1)
    decay: Literal["powers", "linspace"] = "powers"
    eps: float = Field(default=1e-6, gt=0)

    def build(self, place: LayerPlace) -> RetNet:
        return RetNet(self, place)


class RetNet(Mixer):
    """Projections `q_proj`, `k_proj`, `v_proj`, `g_proj`, `out_proj`, heads major in their features."""

    def __init__(self, options: RetNetOptions, place: LayerPlace) -> None:
        super().__init__()
        if place.width % (2 * options.heads):
            raise ValueError(
                f"retnet: width {place.width} is not divisible by {options.heads} heads of even width; "
                "choose retnet.heads so that it is"
            )
        self.options, self.heads = options, options.heads
        self.key_dim, self.value_dim = place.width // options.heads, options.expand * place.width // options.heads
        values = options.expand * place.width
        self.q_proj = Linear(place.width, place.width, xavier(2**-2.5))
        self.k_proj = Linear(place.width, place.width, xavier(2**-2.5))
        self.v_proj = Linear(place.width, values, xavier(2**-2.5))
        self.g_proj = Linear(place.width, values, xavier(2**-2.5))
        self.out_proj = Linear(values, place.width, xavier(2**-1))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        return self.retain(x_BTD, shard)[0]

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        y_BTD, leaving = self.retain(x_BTD, shard, state["position"], state["retention"])
        return y_BTD, {"position": state["position"] + shard.stop, "retention": leaving()}

    def retain(
        self, x_BTD: Tensor, shard: SequenceShard, begun: Tensor | int = 0, initial_BHPK: Tensor | None = None
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """(out, what gives S after this shard's last token), given how many tokens, and what S, before the sequence."""
        positions_T = begun + torch.arange(shard.start, shard.stop, device=x_BTD.device)
        q_BTHK, k_BTHK, v_BTHP = self.project(x_BTD, positions_T)
        log_gamma_H = self.log_gamma(x_BTD.device)
        decay_BTH = log_gamma_H.to(torch.promote_types(x_BTD.dtype, torch.float32)).expand(*x_BTD.shape[:2], -1)
        transition = Constant(log_gamma_H[:, None, None], shard.reset_mask(x_BTD.device))
        o_BTHP, leaving = split_dual(v_BTHP, decay_BTH, k_BTHK, q_BTHK, transition, shard, initial_BHPK)
        return self.output(o_BTHP.to(x_BTD.dtype), self.g_proj(x_BTD)), leaving

    def project(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys (B, T, H, K), values (B, T, H, P)."""
        q_BTHK, k_BTHK, v_BTHP = (
            projection(x_BTD).unflatten(-1, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHK, k_BTHK = (
            rotary(part, positions_T, base=self.rotary_base, style="pairs")
            for part in (q_BTHK, k_BTHK * self.key_dim**-0.5)
        )
        return q_BTHK, k_BTHK, v_BTHP

    @property
    def rotary_base(self) -> float:
        """torchscale's angles reach from 1 to exactly 1 / 10000; rotary's last pair is one step short of its base."""
        return 10000 ** (self.key_dim / (self.key_dim - 2)) if self.key_dim > 2 else 10000.0

    def log_gamma(self, device: torch.device) -> Tensor:
        """(H,), float64."""
        if self.options.decay == "powers":
            forgotten_H = 2.0 ** -torch.arange(5, 5 + self.heads, device=device, dtype=torch.float64)
        else:
            ends = math.log(1 / 32), math.log(1 / 512)
            forgotten_H = torch.linspace(*ends, self.heads, device=device, dtype=torch.float64).exp()
        return torch.log1p(-forgotten_H)

    def output(self, o_BTHP: Tensor, g_BTC: Tensor) -> Tensor:
        """The norm of each head, the gate, and back to the model's width."""
        o_BTC = o_BTHP.flatten(-2)
        ones_C = at_least_float32(o_BTC.new_ones(o_BTC.shape[-1]))
        o_BTC = rms_norm(o_BTC, ones_C, self.options.eps, groups=self.heads)
        return self.out_proj(F.silu(g_BTC) * o_BTC)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch, self.heads, self.value_dim, self.key_dim)
        return {
            "position": torch.zeros(1, device=device, dtype=torch.int64),
            "retention": torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        }

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        q_BTHK, k_BTHK, v_BTHP = self.project(x_BD.unsqueeze(1), state["position"])
        q_BHK, k_BHK, v_BHP = q_BTHK.squeeze(1), k_BTHK.squeeze(1), v_BTHP.squeeze(1)
        retention_BHPK = state["retention"]
        gamma_H11 = torch.exp(self.log_gamma(x_BD.device)).to(retention_BHPK.dtype)[:, None, None]
        retention_BHPK = gamma_H11 * retention_BHPK + v_BHP.unsqueeze(-1) * k_BHK.unsqueeze(-2)
        o_BHP = (retention_BHPK * q_BHK.unsqueeze(-2)).sum(dim=-1)
        y_BD = self.output(o_BHP.to(x_BD.dtype), self.g_proj(x_BD))
        return y_BD, {"position": state["position"] + 1, "retention": retention_BHPK}

    def flops_per_token(self, context: int) -> float:
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.out_proj)
        # a state element is decayed (a product), fed (a product, a sum) and read (a product, a sum)
        state = 5.0 * self.heads * self.value_dim * self.key_dim
        return linear_flops(*(matrix.weight for matrix in matrices)) + state


def xavier(gain: float) -> Initialiser:
    """Uniform within gain sqrt(6 / (D + F)) (Glorot and Bengio, 2010)."""
    return lambda shape, generator: (
        (torch.rand(tuple(shape), generator=generator) * 2 - 1) * gain * math.sqrt(6 / (shape[0] + shape[1]))
    )
