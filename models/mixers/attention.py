"""Causal softmax attention with grouped keys and values and rotary positions (Vaswani et al., arXiv 1706.03762).

    q, k, v = x W_q, x W_k, x W_v;  rotate q, k by their positions;  out = softmax(q k' / sqrt(K)) v W_o

H query heads share G heads of keys and values: G = H is multi-head, G = 1 multi-query, between them grouped-query
attention (arXiv 2305.13245). Rotation by GLOBAL position (arXiv 2104.09864); `rotary_base: null` leaves positions
out, as Jamba does. How keys meet queries of other shards is `parallel.causal_attention`'s matter. With a `window` of W
(sliding-window attention, arXiv 2310.06825) a query meets the last W tokens of its document, itself among them: then
the W - 1 tokens before a shard, and before a token that is decoded, are all that it needs of the past.

Shapes: B batch, T local tokens, S tokens so far, D model width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels import attention, rotary
from ...parallel import SequenceShard, causal_attention, halo
from ..parameters import Linear, normal
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops, tokens_so_far

QUERIES_AT_ONCE = 512
"""Of windowed attention, at least: blocks of few queries would spend their time between calls."""


class AttentionOptions(MixerOptions):
    """Causal softmax attention.

    Attributes:
        heads: query heads.
        kv_heads: heads of keys and values, which query heads share; by default as many as `heads`.
        head_dim: width of a head; by default width / heads.
        rotary_base: of the rotary positions' wavelengths; null: no positions.
        rotary_dim: how many features of a head are rotated; by default all.
        rotary_scale: positions are divided by it (position interpolation, arXiv 2306.15595).
        bias: whether all projections have biases; "out": the last one alone.
        window: a token attends to so many tokens, itself among them; by default all of its document.
    """

    heads: int = Field(default=8, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)
    rotary_base: float | None = Field(default=10000.0, gt=0)
    rotary_dim: int | None = Field(default=None, ge=2)
    rotary_scale: float = Field(default=1.0, gt=0)
    bias: bool | Literal["out"] = False
    window: int | None = Field(default=None, ge=1)

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
        self.window = options.window
        init, out_init = normal(place.init_std), normal(place.init_std / math.sqrt(2 * place.num_layers))
        width, bias = place.width, options.bias is True
        self.q_proj = Linear(width, heads * self.head_dim, init, bias=bias)
        self.k_proj = Linear(width, kv_heads * self.head_dim, init, bias=bias)
        self.v_proj = Linear(width, kv_heads * self.head_dim, init, bias=bias)
        self.out_proj = Linear(heads * self.head_dim, width, out_init, bias=bool(options.bias))

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, torch.arange(shard.start, shard.stop, device=x_BTD.device))
        if self.window is None:
            return self.out_proj(causal_attention(q_BTHK, k_BTGK, v_BTGK, shard).flatten(2))
        begin = shard.document_begin(x_BTD.device) - shard.start if shard.document_starts is not None else None
        kv_BS2GK = self.before(torch.stack([k_BTGK, v_BTGK], dim=2), shard)
        return self.out_proj(window_attention(q_BTHK, kv_BS2GK, self.window, begin).flatten(2))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        positions_T = self.position(state) + torch.arange(shard.start, shard.stop, device=x_BTD.device)
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BTD, positions_T)
        kv_BT2GK = torch.stack([k_BTGK, v_BTGK], dim=2)
        # under autocast the projections have another dtype than the parameters, which a state begins with
        known_BS2GK = torch.stack([state["keys"], state["values"]], dim=2).to(kv_BT2GK.dtype)
        past = known_BS2GK.shape[1]
        if self.window is not None:
            kv_BS2GK = torch.cat([known_BS2GK, self.before(kv_BT2GK, shard)], dim=1)
            out_BTHK = window_attention(q_BTHK, kv_BS2GK, self.window)
        else:
            kv_BS2GK = torch.cat([known_BS2GK, tokens_so_far(kv_BT2GK, shard)], dim=1)
            if past:
                out_BTHK, _ = attention(q_BTHK, *kv_BS2GK.unbind(dim=2), query_start=past + shard.start)
            else:
                out_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, shard)
        return self.out_proj(out_BTHK.flatten(2)), self.remembered(kv_BS2GK, state, shard.stop)

    def before(self, kv_BT2GK: Tensor, shard: SequenceShard) -> Tensor:
        """This shard's keys and values after those of the sequence that its first window reaches back to."""
        assert self.window is not None
        reach = min(self.window - 1, shard.bounds[-2])
        if not reach:
            return kv_BT2GK
        before_BW2GK = halo(kv_BT2GK, reach, shard)
        return torch.cat([before_BW2GK[:, max(0, reach - shard.start) :], kv_BT2GK], dim=1)

    def project(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, K), keys and values (B, T, G, K) of the tokens at these global positions."""
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        if self.rotary_base is not None:
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
        state = {"keys": empty, "values": empty}
        return state if self.window is None else {**state, "position": torch.zeros(1, device=device, dtype=torch.int64)}

    def position(self, state: State) -> Tensor | int:
        """How many tokens came before."""
        return state["keys"].shape[1] if self.window is None else state["position"]

    def remembered(self, kv_BS2GK: Tensor, state: State, tokens: int) -> State:
        """What `state` becomes after `tokens` more, of keys and values that end with theirs."""
        if self.window is not None:
            kv_BS2GK = kv_BS2GK[:, max(0, kv_BS2GK.shape[1] - self.window + 1) :]
        keys_BSGK, values_BSGK = kv_BS2GK.unbind(dim=2)
        moved = {} if self.window is None else {"position": state["position"] + tokens}
        return {"keys": keys_BSGK, "values": values_BSGK, **moved}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        positions_1 = self.position(state) + torch.zeros(1, device=x_BD.device, dtype=torch.int64)
        q_BTHK, k_BTGK, v_BTGK = self.project(x_BD.unsqueeze(1), positions_1)
        keys_BSGK = torch.cat([state["keys"].to(k_BTGK.dtype), k_BTGK], dim=1)
        values_BSGK = torch.cat([state["values"].to(v_BTGK.dtype), v_BTGK], dim=1)
        out_BTHK, _ = attention(q_BTHK, keys_BSGK, values_BSGK, query_start=keys_BSGK.shape[1] - 1)
        following = self.remembered(torch.stack([keys_BSGK, values_BSGK], dim=2), state, 1)
        return self.out_proj(out_BTHK.flatten(1)), following

    def flops_per_token(self, context: int) -> float:
        matrices = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        window = context if self.window is None else min(self.window, context)
        # the first queries meet one token, two, ...; scores and weighted sum are two operations an element each
        met = (window * (window + 1) / 2 + (context - window) * window) / max(context, 1)
        return linear_flops(*(matrix.weight for matrix in matrices)) + 4.0 * met * self.heads * self.head_dim

    def state_bytes(self, context: int) -> int:
        kept = context if self.window is None else min(context, self.window - 1)
        cache = 2 * kept * self.kv_heads * self.head_dim * self.q_proj.weight.dtype.itemsize
        return cache + (0 if self.window is None else torch.int64.itemsize)


def window_attention(q_BTHK: Tensor, kv_BS2GK: Tensor, window: int, document_begin: Tensor | None = None) -> Tensor:
    """Softmax attention of each query over the last `window` tokens, its own the last of them: (B, T, H, K).

    A block of queries at a time meets the keys that any of them sees, in PyTorch's attention.

    Args:
        kv_BS2GK: keys and values of the S tokens that end with the queries' T.
        document_begin: int64 (B or 1, T), where each query's document begins, counted from the first query.
    """
    length, before = q_BTHK.shape[1], kv_BS2GK.shape[1] - q_BTHK.shape[1]
    size, blocks = max(window, QUERIES_AT_ONCE), []
    for first in range(0, length, size):
        last = min(first + size, length)
        earliest = max(first - window + 1, -before)
        queries_W1 = torch.arange(first, last, device=q_BTHK.device).unsqueeze(1)
        keys_S = torch.arange(earliest, last, device=q_BTHK.device)
        seen = ((keys_S <= queries_W1) & (keys_S > queries_W1 - window)).unsqueeze(0)
        if document_begin is not None:
            seen = seen & (keys_S >= document_begin[:, first:last].unsqueeze(-1))
        q_BHWK = q_BTHK[:, first:last].transpose(1, 2)
        k_BGSK, v_BGSK = kv_BS2GK[:, before + earliest : before + last].transpose(1, 3).unbind(dim=2)
        out_BHWK = F.scaled_dot_product_attention(q_BHWK, k_BGSK, v_BGSK, seen.unsqueeze(1), enable_gqa=True)
        blocks.append(out_BHWK.transpose(1, 2))
    return torch.cat(blocks, dim=1)
