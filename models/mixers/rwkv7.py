"""RWKV-7's time mix (Peng et al., arXiv 2503.14456, BlinkDL/RWKV-LM): a matrix memory that unlearns before it learns.

    x^c = lerp(x_t, x_{t-1}, mix_c) for c in r, w, k, v, a, g
    r, k, v = W_r x^r, W_k x^k, W_v x^v               v <- lerp(v, v of the first layer, sigmoid(v_0 + low_v(x^v)))
    log w = -e^{-1/2} sigmoid(w_0 + low_w(x^w))       a = sigmoid(a_0 + low_a(x^a))         g = low_g(x^g)
    kappa = normalised k * k_k                        k <- k (1 + (a - 1) k_a)
    S_t = S_{t-1} (diag(w) - kappa (a kappa)') + v k'                  y_t = S_t r
    out = W_o (g * (norm(y) + (r . k * r_k) v))

low_c is a product of two thin matrices with a nonlinearity between. Split along the sequence one token crosses each
boundary for the shift, and the memory with the product of its transitions: two matrices N x N a head, whatever the
length, on their way while r and g are projected. The first layer's values belong to the same token and cross nothing;
they come through `share`.

Shapes: B batch, T local tokens, D model width, H heads, N head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels import wkv7
from ...parallel import SequenceShard
from ..parameters import Initialiser, Linear, ParameterModule, at_least_float32, constant, fan_in_uniform, orthogonal
from ..token_shift import token_shift
from .base import LayerPlace, Mixer, MixerOptions, Shared, State, linear_flops, window_before
from .matrix_memory import MatrixMemory

FAMILY = "rwkv7"


class RWKV7Options(MixerOptions):
    """A matrix memory that unlearns. The ranks of its thin matrices are by default the authors' for the width.

    Attributes:
        head_dim: width of a head.
        decay_rank: rank of the matrix that makes the decays.
        rate_rank: rank of the one that makes the learning rates in context.
        value_rank: rank of the one that mixes in the first layer's values.
        gate_rank: rank of the one that makes the gate.
    """

    head_dim: int = Field(default=64, ge=2)
    decay_rank: int | None = Field(default=None, ge=1)
    rate_rank: int | None = Field(default=None, ge=1)
    value_rank: int | None = Field(default=None, ge=1)
    gate_rank: int | None = Field(default=None, ge=1)

    def build(self, place: LayerPlace) -> RWKV7:
        return RWKV7(self, place)


class Thin(ParameterModule):
    """x -> f(x `down`) `up` + `bias`: (..., D) -> (..., D); `down` (D, R), zero at first, `up` (R, D)."""

    def __init__(self, width: int, rank: int, bias: Initialiser | None = None) -> None:
        super().__init__()
        self.down = self.parameter("down", (width, rank), constant(0.0), decay=False, half=True)
        self.up = self.parameter("up", (rank, width), orthogonal(0.1), decay=False, half=True)
        self.bias = self.parameter("bias", (width,), bias) if bias is not None else None

    def forward(self, x_BTD: Tensor, activation: str = "none") -> Tensor:
        hidden = x_BTD @ self.down
        hidden = {"none": lambda h: h, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation](hidden)
        y_BTD = hidden @ self.up
        return y_BTD if self.bias is None else y_BTD + self.bias


class Stored(NamedTuple):
    """What the tokens do to the memory, (..., H, N): names as in `kernels.wkv7`."""

    log_w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class RWKV7(Mixer):
    """`mix` (6, D) in the order r, w, k, v, a, g; the rest as in the equations. Only layers after the family's first
    have `first_value`."""

    def __init__(self, options: RWKV7Options, place: LayerPlace) -> None:
        super().__init__()
        width, head_dim = place.width, options.head_dim
        if width % head_dim:
            raise ValueError(f"rwkv7: width {width} is not divisible by head_dim {head_dim}; set rwkv7.head_dim")
        self.head_dim, self.norm_eps = head_dim, 1e-5 * head_dim
        depth = place.index / max(1, place.num_layers - 1)
        mix = shift_weights(1 - place.index / place.num_layers)
        self.mix = self.parameter("mix", (6, width), mix, decay=False, half=True)
        self.receptance = Linear(width, width, fan_in_uniform(0.5))
        self.key = Linear(width, width, fan_in_uniform(0.05))
        self.value = Linear(width, width, fan_in_uniform(0.5))
        self.output = Linear(width, width, constant(0.0))
        self.decay = Thin(width, options.decay_rank or default_rank(2.5, width), initial_decays(depth, head_dim))
        self.rate = Thin(width, options.rate_rank or default_rank(2.5, width), initial_rates(head_dim))
        self.gate = Thin(width, options.gate_rank or default_rank(5.0, width))
        value_rank = options.value_rank or default_rank(1.7, width)
        self.first_value = None if place.first_of_family else Thin(width, value_rank, ramp(0.73, -0.4))
        self.k_k = self.parameter("k_k", (width,), ramp(0.71, -0.1), half=True)
        self.k_a = self.parameter("k_a", (width,), constant(1.02), half=True)
        self.r_k = self.parameter("r_k", (width // head_dim, head_dim), constant(-0.04), decay=False, half=True)
        self.norm_weight = self.parameter("norm_weight", (width,), constant(1.0))
        self.norm_bias = self.parameter("norm_bias", (width,), constant(0.0))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        return self.share(x_BTD, shard, {})[0]

    def share(self, x_BTD: Tensor, shard: SequenceShard, shared: Shared) -> tuple[Tensor, Shared]:
        y_BTD, _, added = self.recall(x_BTD, token_shift(x_BTD, shard), shard, None, shared)
        return y_BTD, added

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        return self.share_prefill(x_BTD, shard, state, {})[:2]

    def share_prefill(
        self, x_BTD: Tensor, shard: SequenceShard, state: State, shared: Shared
    ) -> tuple[Tensor, State, Shared]:
        before_B1D = window_before(x_BTD, state["shift"].unsqueeze(1), shard)
        before_BTD = torch.cat([before_B1D, x_BTD[:, :-1]], dim=1)
        y_BTD, memory_BHNN, added = self.recall(x_BTD, before_BTD, shard, state["memory"], shared)
        return y_BTD, {"shift": x_BTD[:, -1], "memory": memory_BHNN}, added

    def recall(
        self, x_BTD: Tensor, before_BTD: Tensor, shard: SequenceShard, initial_BHNN: Tensor | None, shared: Shared
    ) -> tuple[Tensor, Tensor, Shared]:
        """(out, the memory after this shard's tokens, what the layer shares)."""
        stored, added = self.project_stored(x_BTD, before_BTD, shared)
        memory = MatrixMemory(*stored, shard, initial_BHNN)
        r_BTHN, gate_BTD = self.project_asked(x_BTD, before_BTD)
        y_BTHN, memory_BHNN = memory.recall(r_BTHN)
        return self.read_out(y_BTHN, r_BTHN, gate_BTD, stored), memory_BHNN, added

    def project_stored(self, x_BTD: Tensor, before_BTD: Tensor, shared: Shared) -> tuple[Stored, Shared]:
        """What changes the memory, given each token and the one before it; and what the layer shares."""
        x_w, x_k, x_v, x_a = (torch.lerp(x_BTD, before_BTD, mix_D) for mix_D in self.mix[1:5])
        k_BTD, v_BTD = self.key(x_k), self.value(x_v)
        added = {FAMILY: v_BTD} if self.first_value is None else {}
        if self.first_value is not None:
            first_BTD = ({FAMILY: v_BTD} | shared)[FAMILY]
            v_BTD = torch.lerp(v_BTD, first_BTD, torch.sigmoid(self.first_value(x_v)).to(v_BTD.dtype))
        log_w_BTD = -math.exp(-0.5) * torch.sigmoid(at_least_float32(self.decay(x_w, "tanh")))
        rate_BTD = torch.sigmoid(self.rate(x_a))
        kappa_BTHN = F.normalize(self.heads(k_BTD * self.k_k), dim=-1)
        k_BTD = k_BTD * (1 + (rate_BTD - 1) * self.k_a)
        log_w, k, v, rate = (self.heads(x) for x in (log_w_BTD, k_BTD, v_BTD, rate_BTD))
        return Stored(log_w, k, v, -kappa_BTHN, kappa_BTHN * rate), added

    def project_asked(self, x_BTD: Tensor, before_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """r (..., H, N) and the output's gate (..., D), likewise."""
        x_r, x_g = (torch.lerp(x_BTD, before_BTD, mix_D) for mix_D in (self.mix[0], self.mix[5]))
        return self.heads(self.receptance(x_r)), self.gate(x_g, "sigmoid")

    def read_out(self, y_BTHN: Tensor, r_BTHN: Tensor, gate_BTD: Tensor, stored: Stored) -> Tensor:
        """out (..., D), given what the memory answered."""
        y_ND = y_BTHN.reshape(-1, self.norm_weight.shape[0]).to(self.norm_weight.dtype)
        normed_ND = F.group_norm(y_ND, y_BTHN.shape[-2], self.norm_weight, self.norm_bias, self.norm_eps)
        bonus_BTHN = (r_BTHN * stored.k * self.r_k).sum(dim=-1, keepdim=True) * stored.v
        return self.output((normed_ND.view_as(gate_BTD) + bonus_BTHN.flatten(-2)) * gate_BTD)

    def heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_dim))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        width, state_dtype = self.mix.shape[1], torch.promote_types(dtype, torch.float32)
        memory = (batch, width // self.head_dim, self.head_dim, self.head_dim)
        return {
            "shift": torch.zeros(batch, width, device=device, dtype=dtype),
            "memory": torch.zeros(*memory, device=device, dtype=state_dtype),
        }

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        return self.share_step(x_BD, state, {})[:2]

    def share_step(self, x_BD: Tensor, state: State, shared: Shared) -> tuple[Tensor, State, Shared]:
        stored, added = self.project_stored(x_BD, state["shift"], shared)
        r_BHN, gate_BD = self.project_asked(x_BD, state["shift"])
        token = (part.unsqueeze(1) for part in (r_BHN, *stored))
        y_B1HN, memory_BHNN = wkv7(*token, initial_state=state["memory"])
        out_BD = self.read_out(y_B1HN.squeeze(1), r_BHN, gate_BD, stored)
        return out_BD, {"shift": x_BD, "memory": memory_BHNN}, added

    def flops_per_token(self, context: int) -> float:
        weights = [matrix.weight for matrix in (self.receptance, self.key, self.value, self.output)]
        for thin in (self.decay, self.rate, self.gate, self.first_value):
            weights += [thin.down, thin.up] if thin is not None else []
        # an element of the memory is decayed (a product), asked for kappa, corrected, fed and read (two each)
        return linear_flops(*weights) + 9.0 * self.mix.shape[1] * self.head_dim


def default_rank(factor: float, width: int) -> int:
    """The authors': factor sqrt(D) in steps of 32."""
    return max(32, round(factor * math.sqrt(width) / 32) * 32)


def shift_weights(remaining: float) -> Initialiser:
    """1 - (i / D)^(e `remaining`) for channel i: how much of the token before, r, w, k, v, a, g."""

    def init(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        place_D = torch.arange(shape[1], dtype=torch.float32) / shape[1]
        return torch.stack([1 - place_D.pow(e * remaining) for e in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)])

    return init


def ramp(middle: float, rise: float) -> Initialiser:
    """From middle - rise / 2 in the first channel to middle + rise / 2 in the last."""
    return lambda shape, generator: middle + rise * (torch.linspace(0, 1, shape[0]) - 0.5)


def zigzag(width: int, head_dim: int) -> Tensor:
    """From -1 to 1 within each head, flat in its middle: (D,)."""
    place_D = torch.linspace(-1, 1, head_dim).repeat(width // head_dim)
    return place_D * place_D.abs()


def initial_decays(depth: float, head_dim: int) -> Initialiser:
    """w_0, slow to fast over the channels and within each head; `depth` is 0 in the first layer and 1 in the last."""

    def init(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return -5.5 + 6 * torch.linspace(0, 1, shape[0]).pow(1 + depth**0.3) + 2.5 * zigzag(shape[0], head_dim)

    return init


def initial_rates(head_dim: int) -> Initialiser:
    """a_0"""
    return lambda shape, generator: ramp(-0.19, 0.4)(shape, generator) + 0.3 * zigzag(shape[0], head_dim)
