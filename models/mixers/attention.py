"""Causal softmax attention with grouped keys and values and rotary positions (Vaswani et al., arXiv 1706.03762).

    q, k, v = x W_q, x W_k, x W_v;  rotate q, k by their positions;  out = softmax(q k' / sqrt(K)) v W_o

H query heads share G heads of keys and values: G = H is multi-head, G = 1 multi-query, between them grouped-query
attention (arXiv 2305.13245). Rotation by GLOBAL position (arXiv 2104.09864); `rotary_base: null` leaves positions
out, as Jamba does. How keys meet queries of other shards is `parallel.causal_attention`'s matter.

Shapes: B batch, T local tokens, S tokens so far, D model width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ...kernels import attention, rotary
from ...parallel import SequenceShard, causal_attention
from ..parameters import Linear, normal
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops, tokens_so_far


class AttentionOptions(MixerOptions):
    """`heads`: H; `kv_heads`: G, by default H; `head_dim`: K, by default width / heads.

    `rotary_dim`: how many of the K are rotated, by default all; `rotary_scale`: positions are divided by it (position
    interpolation, arXiv 2306.15595); `bias`: of all projections, or of the last one alone ("out").
    """

    heads: int = Field(default=8, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    rotary_base: float | None = Field(default=10000.0, gt=0)
    rotary_dim: int | None = Field(default=None, ge=2)
    rotary_scale: float = Field(default=1.0, gt=0)
    bias: bool | Literal["out"] = False

    def build(self, place: LayerPlace) -> Attention:
        return Attention(self, place)


class Attention(Mixer):
    """Projections `q_proj`, `k_proj`, `v_proj`, `out_proj`, heads major in their features."""

    def __init__(self, options: AttentionOptions, place: LayerPlace) -> None:
        super().__init__()
        heads, kv_heads = options.heads, options.kv_heads or options.heads
        if options.head_dim is None and place.width % heads:
            raise ValueError(
                f"attention: width {place.width} is not divisible by {heads} heads; set attention.head_dim"
            )
        if heads % kv_heads:
            raise ValueError(
                f"attention: {heads} heads cannot share {kv_heads} kv_heads evenly; choose a divisor of {heads}"
            )
        self.head_dim = options.head_dim or place.width // heads
        self.rotary_dim = options.rotary_dim or self.head_dim
        if options.rotary_base is not None and self.rotary_dim % 2:
            raise ValueError(f"attention: rotary positions need an even head width, not {self.rotary_dim}")
        if self.rotary_dim > self.head_dim:
            raise ValueError(f"attention: rotary_dim {self.rotary_dim} exceeds the head width {self.head_dim}")
        self.heads, self.kv_heads = heads, kv_heads
        self.rotary_base, self.rotary_scale = options.rotary_base, options.rotary_scale
        init, out_init = normal(place.init_std), normal(place.init_std / math.sqrt(2 * place.num_layers))
        width, bias = place.width, options.bias is True
        self.q_proj = Linear(width, heads * self.head_dim, init, bias=bias)
        self.k_proj = Linear(width, kv_heads * self.head_dim, init, bias=bias)
        self.v_proj = Linear(width, kv_heads * self.head_dim, init, bias=bias)
        self.out_proj = Linear(heads * self.head_dim, width, out_init, bias=bool(options.bias))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, shard.start)
        return self.out_proj(causal_attention(q_BTHK, k_BTGK, v_BTGK, shard).flatten(2))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        past = state["keys"].shape[1]
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, past + shard.start)
        keys_BSGK, values_BSGK = tokens_so_far(torch.stack([k_BTGK, v_BTGK], dim=2), shard).unbind(dim=2)
        if past:
            keys_BSGK = torch.cat([state["keys"], keys_BSGK], dim=1)
            values_BSGK = torch.cat([state["values"], values_BSGK], dim=1)
            out_BTHK, _ = attention(q_BTHK, keys_BSGK, values_BSGK, query_start=past + shard.start)
        else:
            out_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, shard)
        return self.out_proj(out_BTHK.flatten(2)), {"keys": keys_BSGK, "values": values_BSGK}

    def project(self, x_BTD: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K) of the tokens from global position `start` on."""
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.rotary_base is not None:
            positions_T = torch.arange(start, start + x_BTD.shape[1], device=x_BTD.device)
            q_BTHK, k_BTGK = (self.rotate(part, positions_T, self.rotary_base) for part in (q_BTHK, k_BTGK))
        return q_BTHK, k_BTGK, v_BTGK

    def rotate(self, x_BTHK: Tensor, positions_T: Tensor, base: float) -> Tensor:
        if self.rotary_scale != 1:
            positions_T = positions_T.double() / self.rotary_scale
        if self.rotary_dim == self.head_dim:
            return rotary(x_BTHK, positions_T, base=base)
        rotated, kept = x_BTHK.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        return torch.cat([rotary(rotated, positions_T, base=base), kept], dim=-1)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        empty = torch.zeros(batch, 0, self.kv_heads, self.head_dim, device=device, dtype=dtype)
        return {"keys": empty, "values": empty}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        position = state["keys"].shape[1]
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BD.unsqueeze(1), position)
        keys_BSGK = torch.cat([state["keys"], k_BTGK], dim=1)
        values_BSGK = torch.cat([state["values"], v_BTGK], dim=1)
        out_BTHK, _ = attention(q_BTHK, keys_BSGK, values_BSGK, query_start=position)
        return self.out_proj(out_BTHK.flatten(1)), {"keys": keys_BSGK, "values": values_BSGK}

    def flops_per_token(self, context: int) -> float:
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        # a query meets half of the context on average; scores and weighted sum are two operations an element each
        mixing = 2.0 * (context + 1) * self.heads * self.head_dim
        return linear_flops(*(matrix.weight for matrix in matrices)) + mixing

    def state_bytes(self, context: int) -> int:
        return 2 * context * self.kv_heads * self.head_dim * self.q_proj.weight.dtype.itemsize
