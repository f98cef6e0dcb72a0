"""FLASH: the gated attention unit with mixed chunk attention (Hua et al., arXiv 2202.10447).

    u, v, z as in GAU; four rotated rows of z: queries and keys of a quadratic and of a linear attention
    local:    sum over s <= t in t's chunk of relu(q_t . k_s / sqrt(S))^2 v_s / C
    global:   q'_t . (sum over s in earlier chunks of k'_s v_s') / (sqrt(S) n_t)
    out = W_o (u * (local + global))

Chunks of C tokens are counted from the beginning of each document, wherever shards begin. n_t is the number of tokens
in the earlier chunks. The running sum of the global part is a recurrence without decay: split along the sequence it is
a prefix (`parallel.prefix_state`), and the local part asks the shards before it for C tokens.

Internally tokens are taken in blocks of C counted from the shard's first token. Every query of block i stands in a
chunk that begins after the first token of block i - 1; so it meets blocks i - 1 and i pair by pair, quadratically
inside its chunk and linearly before it, and all tokens before block i - 1 through their sum.

Shapes: B batch, T local tokens, I blocks, C tokens of a chunk or block, W = 2 C tokens of two blocks, D model width,
S features of queries and keys, E inner channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...kernels.autograd import own_precision
from ...parallel import Constant, SequenceShard, halo, prefix_state
from ..parameters import at_least_float32
from .base import LayerPlace, State, linear_flops, window_before
from .gau import GatedUnit, GatedUnitOptions


class FlashOptions(GatedUnitOptions):
    """Gated attention in chunks.

    Attributes:
        chunk: tokens of a chunk, inside which attention is quadratic.
    """

    chunk: int = Field(default=256, ge=1)

    def build(self, place: LayerPlace) -> Flash:
        return Flash(self, place)


class Flash(GatedUnit):
    """Rows of gamma and beta: quadratic query and key, linear query and key."""

    def __init__(self, options: FlashOptions, place: LayerPlace) -> None:
        super().__init__(options, place, rows=4)
        self.chunk = options.chunk

    def forward(self, x_BTD: Tensor, shard: SequenceShard) -> Tensor:
        device, length = x_BTD.device, x_BTD.shape[1]
        positions_T = torch.arange(shard.start, shard.stop, device=device)
        u_BTE, v_BTE, (q_BTS, k_BTS, q_lin_BTS, k_lin_BTS) = self.project(x_BTD, positions_T)
        kv = torch.cat([k_BTS, k_lin_BTS, v_BTE], dim=-1)
        kv = torch.cat([halo(kv, self.chunk, shard), kv], dim=1)
        entering_BSE = self.entering(kv, shard)
        # whole blocks, the block before the first included; what is added at the end is cut off again
        sizes = [self.key_dim, self.key_dim, self.channels]
        k_BICS, k_lin_BICS, v_BICE = self.blocks(kv).split(sizes, dim=-1)
        queries = self.blocks(torch.cat([q_BTS, q_lin_BTS], dim=-1) * self.key_dim**-0.5)
        q_BICS, q_lin_BICS = queries.split(self.key_dim, dim=-1)
        reach = Reach.of(shard, self.chunk, device)
        weights_BICW = self.weights(q_BICS, k_BICS, q_lin_BICS, k_lin_BICS, reach)
        near_BICE, last_BICE = v_BICE[:, :-1], v_BICE[:, 1:]
        out_BICE = weights_BICW[..., : self.chunk] @ near_BICE + weights_BICW[..., self.chunk :] @ last_BICE
        sums_BISE = self.running_sums(entering_BSE, k_lin_BICS, v_BICE, reach)
        far_BICE = wide_product(q_lin_BICS, sums_BISE)
        far_BICE = (far_BICE / reach.before_chunk_BIC1).masked_fill(~reach.far_BIC1, 0)
        out_BTE = (out_BICE + far_BICE).flatten(1, 2)[:, :length]
        return self.out_proj(u_BTE * out_BTE.to(x_BTD.dtype))

    def prefill(self, x_BTD: Tensor, shard: SequenceShard, state: State) -> tuple[Tensor, State]:
        """Chunk by chunk of the document: each process takes in what came before it in its first token's chunk."""
        begun, length = state["keys"].shape[1], x_BTD.shape[1]
        first = begun + shard.start  # counted from the beginning of the state's chunk
        position_1 = state["tokens_before"] + first
        positions_T = position_1 + torch.arange(length, device=x_BTD.device)
        u_BTE, v_BTE, (q_BTS, k_BTS, q_lin_BTS, k_lin_BTS) = self.project(x_BTD, positions_T)
        carried = torch.cat([state["keys"], state["linear_keys"], state["values"]], dim=-1)
        carried = F.pad(carried, (0, 0, self.chunk - 1 - begun, 0))
        kv = torch.cat([k_BTS, k_lin_BTS, v_BTE], dim=-1)
        missing = first % self.chunk  # tokens of this shard's first chunk that stand before it
        kv = torch.cat([window_before(kv, carried, shard), kv], dim=1)[:, self.chunk - 1 - missing :]
        sizes = [self.key_dim, self.key_dim, self.channels]
        k_BICS, k_lin_BICS, v_BICE = self.blocks(kv).split(sizes, dim=-1)
        queries = F.pad(torch.cat([q_BTS, q_lin_BTS], dim=-1) * self.key_dim**-0.5, (0, 0, missing, 0))
        q_BICS, q_lin_BICS = self.blocks(queries).split(self.key_dim, dim=-1)
        out_BICE = F.relu((q_BICS @ k_BICS.mT).tril()).square() / self.chunk @ v_BICE
        complete = kv.shape[1] // self.chunk
        fed_BISE = wide_product(k_lin_BICS[:, :complete].mT, v_BICE[:, :complete])
        undiminished = Constant(fed_BISE.new_zeros(()))
        entering_BSE = prefix_state(undiminished, fed_BISE.sum(dim=1), shard, initial=state["sum"])
        sums_BISE = torch.cat([entering_BSE.unsqueeze(1), fed_BISE], dim=1).cumsum(dim=1)
        before_I = position_1 - missing + self.chunk * torch.arange(v_BICE.shape[1], device=x_BTD.device)
        far_BICE = wide_product(q_lin_BICS, sums_BISE[:, : v_BICE.shape[1]])
        out_BTE = (out_BICE + far_BICE / before_I.clamp(min=1).view(-1, 1, 1)).flatten(1, 2)
        y_BTD = self.out_proj(u_BTE * out_BTE[:, missing : missing + length].to(x_BTD.dtype))
        rest = kv[:, complete * self.chunk :].split(sizes, dim=-1)
        cache = dict(zip(("keys", "linear_keys", "values"), rest, strict=True))
        after_1 = position_1 - missing + complete * self.chunk
        return y_BTD, {**cache, "sum": sums_BISE[:, complete], "tokens_before": after_1}

    def weights(self, q_BICS: Tensor, k_BICS: Tensor, q_lin_BICS: Tensor, k_lin_BICS: Tensor, reach: Reach) -> Tensor:
        """(B, I, C, W) weight of each token of blocks i - 1 and i for each query of block i."""
        quadratic = F.relu(_scores(q_BICS, k_BICS)).square() / self.chunk
        linear = _scores(q_lin_BICS, k_lin_BICS) / reach.before_chunk_BIC1.to(q_BICS.dtype)
        return torch.where(reach.in_chunk_BICW, quadratic, linear.masked_fill(~reach.in_document_BICW, 0))

    def entering(self, kv: Tensor, shard: SequenceShard) -> Tensor:
        """(B, S, E), float32 or better: the sum over the document's tokens before the block that precedes this shard.

        So what a shard tells is the sum over its tokens moved back by one chunk, all of which it has.
        """
        state_dtype = torch.promote_types(kv.dtype, torch.float32)
        if shard.size == 1:
            return kv.new_zeros(kv.shape[0], self.key_dim, self.channels, dtype=state_dtype)
        kv = kv[:, : shard.local_length].to(state_dtype)
        k_lin_BTS, v_BTE = kv[..., self.key_dim :].split([self.key_dim, self.channels], dim=-1)
        starts_BT = shard.start_mask_of(shard.start - self.chunk, shard.stop - self.chunk, kv.device)
        reset_B = None
        if starts_BT is not None:
            k_lin_BTS = k_lin_BTS * _survives(starts_BT).unsqueeze(-1)
            reset_B = starts_BT.any(dim=1)
        undiminished = Constant(kv.new_zeros(()), reset_B)
        return prefix_state(undiminished, wide_product(k_lin_BTS.mT, v_BTE), shard)

    def running_sums(self, sum_BSE: Tensor, k_lin_BICS: Tensor, v_BICE: Tensor, reach: Reach) -> Tensor:
        """(B, I, S, E): for every block i the sum over the document's tokens before block i - 1."""
        if reach.survives_BIC is not None:
            k_lin_BICS = k_lin_BICS * reach.survives_BIC.unsqueeze(-1)
        own_BISE = wide_product(k_lin_BICS[:, :-2].mT, v_BICE[:, :-2])
        sums = [sum_BSE]
        for block, own_BSE in enumerate(own_BISE.unbind(dim=1)):
            if reach.resets_BI is not None:
                sum_BSE = sum_BSE.masked_fill(reach.resets_BI[:, block, None, None], 0)
            sum_BSE = sum_BSE + own_BSE
            sums.append(sum_BSE)
        return torch.stack(sums, dim=1)

    def blocks(self, x_BTF: Tensor) -> Tensor:
        """(B, I, C, F), zeros after the last token."""
        return F.pad(x_BTF, (0, 0, 0, -x_BTF.shape[1] % self.chunk)).unflatten(1, (-1, self.chunk))

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        state_dtype = torch.promote_types(dtype, torch.float32)
        widths = {"keys": self.key_dim, "linear_keys": self.key_dim, "values": self.channels}
        cache = {name: torch.zeros(batch, 0, width, device=device, dtype=dtype) for name, width in widths.items()}
        total = torch.zeros(batch, self.key_dim, self.channels, device=device, dtype=state_dtype)
        return {**cache, "sum": total, "tokens_before": torch.zeros(1, device=device, dtype=torch.int64)}

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        before_1 = state["tokens_before"]
        u_B1E, v_B1E, rows = self.project(x_BD.unsqueeze(1), before_1 + state["keys"].shape[1])
        q_B1S, k_B1S, q_lin_B1S, k_lin_B1S = rows
        new = {"keys": k_B1S, "linear_keys": k_lin_B1S, "values": v_B1E}
        cache = {name: torch.cat([state[name], token], dim=1) for name, token in new.items()}
        scale, sum_BSE = self.key_dim**-0.5, state["sum"]
        weights_B1C = F.relu((q_B1S * scale) @ cache["keys"].transpose(1, 2)).square() / self.chunk
        mean_BSE = sum_BSE / before_1.clamp(min=1)
        out_B1E = weights_B1C @ cache["values"] + wide_product(q_lin_B1S * scale, mean_BSE)
        y_BD = self.out_proj((u_B1E * out_B1E.to(x_BD.dtype)).squeeze(1))
        if cache["keys"].shape[1] == self.chunk:  # the chunk is complete: what it held goes into the sum
            sum_BSE = sum_BSE + wide_product(cache["linear_keys"].mT, cache["values"])
            before_1 = before_1 + self.chunk
            cache = {name: tensor[:, :0] for name, tensor in cache.items()}
        return y_BD, {**cache, "sum": sum_BSE, "tokens_before": before_1}

    def flops_per_token(self, context: int) -> float:
        # the first queries of a chunk meet one token, two, ...; an element of the sum is fed and read
        chunks, rest = divmod(max(context, 1), self.chunk)
        met = (chunks * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / 2 / max(context, 1)
        pairs = 2 * met * (self.key_dim + self.channels)
        sums = 4 * self.key_dim * self.channels
        return linear_flops(self.in_proj.weight, self.out_proj.weight) + pairs + sums

    def state_bytes(self, context: int) -> int:
        dtype = self.gamma.dtype
        cache = context % self.chunk * (2 * self.key_dim + self.channels) * dtype.itemsize
        sums = self.key_dim * self.channels * torch.promote_types(dtype, torch.float32).itemsize
        return cache + sums + torch.int64.itemsize


@dataclass(frozen=True)
class Reach:
    """What each query meets; the batch dimension is 1 where rows share their documents.

    Attributes:
        in_chunk_BICW: which tokens of blocks i - 1 and i stand in the query's chunk and not after it.
        in_document_BICW: which stand in earlier chunks of its document.
        before_chunk_BIC1: how many tokens of the document stand in earlier chunks, at least 1.
        far_BIC1: whether its document began before block i - 1.
        survives_BIC: tokens of the blocks i - 1 after which no document begins in their block; None without documents.
        resets_BI: whether a document begins in block i - 1.
    """

    in_chunk_BICW: Tensor
    in_document_BICW: Tensor
    before_chunk_BIC1: Tensor
    far_BIC1: Tensor
    survives_BIC: Tensor | None
    resets_BI: Tensor | None

    @classmethod
    def of(cls, shard: SequenceShard, chunk: int, device: torch.device) -> Reach:
        num_blocks = -(-shard.local_length // chunk)
        begin_BT = shard.document_begin(device)
        missing = num_blocks * chunk - shard.local_length
        begin_BT = torch.cat([begin_BT, begin_BT[:, -1:].expand(-1, missing)], dim=1)
        begin_BIC1 = begin_BT.unflatten(1, (num_blocks, chunk)).unsqueeze(-1)
        query_IC1 = torch.arange(shard.start, shard.start + num_blocks * chunk, device=device).view(-1, chunk, 1)
        base_I11 = query_IC1[:, :1] - chunk
        key_I1W = base_I11 + torch.arange(2 * chunk, device=device)
        before_BIC1 = (query_IC1 - begin_BIC1) // chunk * chunk
        chunk_begin_BIC1 = begin_BIC1 + before_BIC1
        starts_BT = shard.start_mask_of(shard.start - chunk, shard.start + num_blocks * chunk, device)
        starts_BIC = None if starts_BT is None else starts_BT.unflatten(1, (num_blocks + 1, chunk))
        return cls(
            in_chunk_BICW=(key_I1W >= chunk_begin_BIC1) & (key_I1W <= query_IC1),
            in_document_BICW=(key_I1W >= begin_BIC1) & (key_I1W < chunk_begin_BIC1),
            before_chunk_BIC1=before_BIC1.clamp(min=1),
            far_BIC1=begin_BIC1 < base_I11,
            survives_BIC=None if starts_BIC is None else _survives(starts_BIC),
            resets_BI=None if starts_BIC is None else starts_BIC.any(dim=-1),
        )


@own_precision
def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in float32 or better, under autocast too: of what makes or reads sums over the sequence."""
    return at_least_float32(left) @ at_least_float32(right)


def _scores(q_BICS: Tensor, k_BICS: Tensor) -> Tensor:
    """(B, I, C, W): the queries of block i against blocks i - 1 and i."""
    near, last = (q_BICS @ part.transpose(2, 3) for part in (k_BICS[:, :-1], k_BICS[:, 1:]))
    return torch.cat([near, last], dim=-1)


def _survives(starts: Tensor) -> Tensor:
    """Where no document begins later along the last dimension."""
    return (starts.flip(-1).cumsum(dim=-1).flip(-1) - starts.int()) == 0
