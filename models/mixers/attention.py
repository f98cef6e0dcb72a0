"""Causal softmax attention with grouped keys and values and rotary positions (Vaswani et al., arXiv 1706.03762).

    q, k, v = x W_q, x W_k, x W_v;  rotate q, k by their positions;  out = softmax(q k' / sqrt(K)) v W_o

H query heads share G heads of keys and values: G = H is multi-head, G = 1 multi-query, between them grouped-query
attention (arXiv 2305.13245). Rotation by GLOBAL position (arXiv 2104.09864); `rotary_base: null` leaves positions
out, as Jamba does. How keys meet queries of other shards is `parallel.causal_attention`'s matter.

Shapes: B batch, T local tokens, S tokens so far, D model width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from ...kernels import attention, rotary
from ...parallel import SequenceShard, causal_attention
from ..parameters import Linear, normal
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops


class AttentionOptions(MixerOptions):
    """`heads`: H; `kv_heads`: G, by default H; `head_dim`: K, by default width / heads."""

    heads: int = Field(default=8, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    rotary_base: float | None = Field(default=10000.0, gt=0)
    bias: bool = False

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
        if options.rotary_base is not None and self.head_dim % 2:
            raise ValueError(f"attention: rotary positions need an even head width, not {self.head_dim}")
        self.heads, self.kv_heads, self.rotary_base = heads, kv_heads, options.rotary_base
        init, out_init = normal(place.init_std), normal(place.init_std / math.sqrt(2 * place.num_layers))
        width, bias = place.width, options.bias
        self.q_proj = Linear(width, heads * self.head_dim, init, bias=bias)
        self.k_proj = Linear(width, kv_heads * self.head_dim, init, bias=bias)
        self.v_proj = Linear(width, kv_heads * self.head_dim, init, bias=bias)
        self.out_proj = Linear(heads * self.head_dim, width, out_init, bias=bias)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, shard.start)
        return self.out_proj(causal_attention(q_BTHK, k_BTGK, v_BTGK, shard).flatten(2))

    def project(self, x_BTD: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K) of the tokens from global position `start` on."""
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.rotary_base is not None:
            positions_T = torch.arange(start, start + x_BTD.shape[1], device=x_BTD.device)
            q_BTHK = rotary(q_BTHK, positions_T, base=self.rotary_base)
            k_BTGK = rotary(k_BTGK, positions_T, base=self.rotary_base)
        return q_BTHK, k_BTGK, v_BTGK

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
