"""The gated attention unit, GAU (Hua et al., arXiv 2202.10447).

    u, v = SiLU(x W_u), SiLU(x W_v);    z = SiLU(x W_z);    q, k = gamma_q z + beta_q, gamma_k z + beta_k, rotated
    a_ts = relu(q_t . k_s / sqrt(S))^2 / n_t                out = W_o (u * (a v))

One head over all channels, no softmax; it takes the place of attention and feed-forward layer together. n_t counts
the tokens that t sees. The paper divides by the length of the sequence, which a decoder does not know, and adds a
bias of positions to scores that are nearly zero at first; here rotation tells positions, and gamma begins around one
so that there is something to learn from. Split along the sequence the parts of the sum simply add
(`parallel.pair_sum`); decoding keeps keys and values.

Shapes: B batch, T local tokens, W queries, S tokens met (as the dimension after W) and features of queries and keys
(last), D model width, E inner channels, R rows of gamma and beta.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels import rotary
from ...kernels.attention import Positions
from ...parallel import SequenceShard, pair_sum
from ..parameters import Linear, constant, fan_in_uniform
from .base import LayerPlace, Mixer, MixerOptions, State, linear_flops, tokens_so_far

SCORES_AT_ONCE = 1 << 24
"""Scores of one batch that exist at one time; the rest is computed again in the backward pass."""


class GatedUnitOptions(MixerOptions):
    """What gated attention units have.

    Attributes:
        key_dim: features of queries and keys, even: rotary positions turn pairs.
        expand: inner channels for each of the width.
        rotary_base: of the rotary positions' wavelengths.
    """

    key_dim: int = Field(default=128, ge=2, multiple_of=2)
    expand: int = Field(default=2, ge=1)
    rotary_base: float = Field(default=10000.0, gt=0)


class GAUOptions(GatedUnitOptions):
    """A gated attention unit; see `GatedUnitOptions`."""

    def build(self, place: LayerPlace) -> GAU:
        return GAU(self, place)


class GatedUnit(Mixer):
    """What GAU and FLASH share. `in_proj` makes u, v and z in this order; `gamma` and `beta`: (R, S)."""

    def __init__(self, options: GatedUnitOptions, place: LayerPlace, rows: int) -> None:
        super().__init__()
        self.key_dim, self.channels = options.key_dim, options.expand * place.width
        self.rotary_base = options.rotary_base
        self.in_proj = Linear(place.width, 2 * self.channels + self.key_dim, fan_in_uniform())
        self.gamma = self.parameter("gamma", (rows, self.key_dim), near_one, decay=False, half=True)
        self.beta = self.parameter("beta", (rows, self.key_dim), constant(0.0), decay=False, half=True)
        self.out_proj = Linear(self.channels, place.width, fan_in_uniform(place.num_layers**-0.5))

    def project(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """u and v (B, T, E), and the R rotated rows (B, T, S); the queries among them carry the scores' 1 / sqrt(S)."""
        sizes = [self.channels, self.channels, self.key_dim]
        u_BTE, v_BTE, z_BTS = F.silu(self.in_proj(x_BTD)).split(sizes, dim=-1)
        rows_BTRS = torch.addcmul(self.beta, z_BTS.unsqueeze(2), self.gamma)
        rows_BTRS = rotary(rows_BTRS, positions_T, base=self.rotary_base)
        return u_BTE, v_BTE, rows_BTRS.unbind(dim=2)


class GAU(GatedUnit):
    """Rows of gamma and beta: query, key."""

    def __init__(self, options: GAUOptions, place: LayerPlace) -> None:
        super().__init__(options, place, rows=2)

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        positions_T = torch.arange(shard.start, shard.stop, device=x_BTD.device)
        u_BTE, v_BTE, (q_BTS, k_BTS) = self.project(x_BTD, positions_T)
        sums_BTE = pair_sum(squared_relu, q_BTS, torch.cat([k_BTS, v_BTE], dim=-1), shard)
        seen_BT1 = (positions_T - shard.document_begin(x_BTD.device) + 1).unsqueeze(-1)
        return self.out_proj(u_BTE * (sums_BTE / seen_BT1).to(x_BTD.dtype))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        past = state["keys"].shape[1]
        positions_T = past + torch.arange(shard.start, shard.stop, device=x_BTD.device)
        u_BTE, v_BTE, (q_BTS, k_BTS) = self.project(x_BTD, positions_T)
        keys_values = torch.cat([k_BTS, v_BTE], dim=-1)
        known = torch.cat([state["keys"], state["values"]], dim=-1)
        sums_BTE = pair_sum(squared_relu, q_BTS, keys_values, shard)
        if past:
            sums_BTE = sums_BTE + squared_relu(q_BTS, known, Positions(past + shard.start, 0, None))
        y_BTD = self.out_proj(u_BTE * (sums_BTE / (positions_T + 1).unsqueeze(-1)).to(x_BTD.dtype))
        known = torch.cat([known, tokens_so_far(keys_values, shard)], dim=1)
        return y_BTD, {"keys": known[..., : self.key_dim], "values": known[..., self.key_dim :]}

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        widths = {"keys": self.key_dim, "values": self.channels}
        return {name: torch.zeros(batch, 0, width, device=device, dtype=dtype) for name, width in widths.items()}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        position = state["keys"].shape[1]
        positions_T = torch.full((1,), position, device=x_BD.device)
        u_B1E, v_B1E, (q_B1S, k_B1S) = self.project(x_BD.unsqueeze(1), positions_T)
        keys, values = torch.cat([state["keys"], k_B1S], dim=1), torch.cat([state["values"], v_B1E], dim=1)
        sums_B1E = squared_relu(q_B1S, torch.cat([keys, values], dim=-1), Positions(position, 0, None))
        y_B1E = u_B1E * (sums_B1E / (position + 1)).to(x_BD.dtype)
        return self.out_proj(y_B1E.squeeze(1)), {"keys": keys, "values": values}

    def flops_per_token(self, context: int) -> float:
        # a query meets half of the context on average; scores and weighted sum are two operations an element each
        mixing = (context + 1) * (self.key_dim + self.channels)
        return linear_flops(self.in_proj.weight, self.out_proj.weight) + float(mixing)

    def state_bytes(self, context: int) -> int:
        return context * (self.key_dim + self.channels) * self.gamma.dtype.itemsize


def squared_relu(q_BWS: Tensor, keys_values: Tensor, where: Positions) -> Tensor:
    """sum_s relu(q_t . k_s / sqrt(S))^2 v_s over the keys that each query sees: (B, W, E), float32 or better.

    `keys_values`: (B, tokens, S + E). A block of queries at a time; blocks are computed again in the backward pass.
    """
    batch, length, num_keys = q_BWS.shape[0], q_BWS.shape[1], keys_values.shape[1]
    size = max(16, SCORES_AT_ONCE // max(1, batch * num_keys))
    blocks = []
    for first in range(0, length, size):
        last = min(first + size, length)
        begin = None if where.document_begin is None else where.document_begin[:, first:last]
        block = Positions(where.query_start + first, where.key_start, begin)
        reach = max(1, min(num_keys, where.query_start + last - where.key_start))  # no query here sees a later key
        arguments = q_BWS[:, first:last], keys_values[:, :reach], block
        if length > size and torch.is_grad_enabled():
            blocks.append(checkpoint(_squared_relu, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_squared_relu(*arguments))
    return torch.cat(blocks, dim=1)


def _squared_relu(q_BWS: Tensor, keys_values: Tensor, where: Positions) -> Tensor:
    key_dim, device = q_BWS.shape[-1], q_BWS.device
    queries_W1 = torch.arange(where.query_start, where.query_start + q_BWS.shape[1], device=device).unsqueeze(-1)
    keys_S = torch.arange(where.key_start, where.key_start + keys_values.shape[1], device=device)
    seen = keys_S <= queries_W1
    if where.document_begin is not None:
        seen = seen & (keys_S >= where.document_begin.unsqueeze(-1))
    k, v = keys_values[..., :key_dim], keys_values[..., key_dim:]
    scores = torch.matmul(q_BWS * key_dim**-0.5, k.transpose(1, 2))
    weights = F.relu(scores).square().masked_fill(~seen, 0)
    out = torch.matmul(weights, v)
    return out.to(torch.promote_types(out.dtype, torch.float32))


def near_one(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """N(1, 0.02^2)"""
    return 1 + 0.02 * torch.randn(tuple(shape), generator=generator)
