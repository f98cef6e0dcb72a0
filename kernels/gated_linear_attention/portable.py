"""Gated linear attention in PyTorch: products inside chunks, states between them.

With a decay for every key, the weight of input s in output t is sum_K q_t k_s times the decays after s up to t. It
splits into a factor for t and one for s only relative to a token between them, or one of the two overflows. A chunk of
Q tokens is therefore cut into blocks of C. Within a block, and then from block to block, the earlier keys are carried
along and decay as the state would: every number is a product of decays, none above one, so nothing overflows and no
digits cancel, whatever the decays.

Legend: B batch, T tokens, H heads, K key width, V value width, M chunks of Q tokens, J blocks of C tokens in a chunk.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..state_space_dual.portable import causal_pairs, chunked, documents_before, pass_states

CHUNK = 64
BLOCK = 8


def _by_head(x_BTHK: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, M, H, Q, K)."""
    return chunked(x_BTHK.to(dtype), chunk).transpose(2, 3)


def _running_product(x: Tensor, dim: int) -> Tensor:
    """Cumulative product whose derivative holds at zeros too (torch.cumprod divides)."""
    total, products = None, []
    for factor in x.unbind(dim):
        total = factor if total is None else total * factor
        products.append(total)
    return torch.stack(products, dim)


def _within_blocks(q: Tensor, k: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """For (..., C, K): weights (..., C, C) of a block's own tokens, and its keys as they are at its end."""
    rows = []
    keys = k[..., :0, :]
    for t in range(q.shape[-2]):
        keys = torch.cat((keys * decay[..., t : t + 1, :], k[..., t : t + 1, :]), -2)
        row = (keys * q[..., t : t + 1, :]).sum(-1)
        rows.append(F.pad(row, (0, q.shape[-2] - t - 1)))
    return torch.stack(rows, -2), keys


def _weights(q: Tensor, k: Tensor, decay: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
    """For (B, M, H, J, C, K): weights (B, M, H, Q, Q), and keys (B, M, H, Q, K) as they are at the chunk's end.

    `local`: product of decays since the block's begin, the token's included.
    """
    blocks, tokens = q.shape[3:5]
    own, ends = _within_blocks(q, k, decay)
    queries, whole = (q * local).unbind(3), local[..., -1:, :].unbind(3)
    rows = []
    keys = ends[:, :, :, 0, :0]
    for i, (row, end) in enumerate(zip(own.unbind(3), ends.unbind(3), strict=True)):
        if i:
            row = torch.cat((queries[i] @ keys.mT, row), -1)
        rows.append(F.pad(row, (0, (blocks - i - 1) * tokens)))
        keys = torch.cat((keys * whole[i], end), -2)
    return torch.cat(rows, -2), keys


def segment(state_BHKV: Tensor, sequences: Sequence[Tensor], starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """One segment of `walk`."""
    batch, length, heads, _ = sequences[0].shape
    blocks = min(CHUNK // BLOCK, max(1, -(-length // BLOCK)))
    chunk = blocks * BLOCK
    q, k, v, log_decay = (_by_head(x, chunk, state_BHKV.dtype) for x in sequences)
    decay = log_decay.exp().unflatten(3, (blocks, BLOCK))
    local = _running_product(decay, 4)
    weights, keys_left = _weights(q.unflatten(3, (blocks, BLOCK)), k.unflatten(3, (blocks, BLOCK)), decay, local)
    before_block = _running_product(F.pad(local[..., :-1, -1, :], (0, 0, 1, 0), value=1.0), 3)
    since_begin = (local * before_block.unsqueeze(4)).flatten(3, 4)
    whole_BMHK = since_begin[..., -1, :]
    count_BMQ = documents_before(starts_BT, chunk)
    if count_BMQ is not None:
        weights = torch.where(causal_pairs(chunk, count_BMQ, q.device).unsqueeze(2), weights, 0.0)
        first = (count_BMQ == 0)[:, :, None, :, None]
        since_begin, whole_BMHK = since_begin * first, whole_BMHK * first[..., -1, :]
        keys_left = keys_left * (count_BMQ == count_BMQ[..., -1:])[:, :, None, :, None]
    entering_BMHKV, state_BHKV = pass_states(state_BHKV, keys_left.mT @ v, whole_BMHK)
    y = weights @ v + (q * since_begin) @ entering_BMHKV
    y_BTHV = y.transpose(2, 3).reshape(batch, y.shape[1] * chunk, heads, y.shape[-1])[:, :length]
    return y_BTHV.to(sequences[2].dtype), state_BHKV


def readout_segment(
    state_BHKV: Tensor, sequences: Sequence[Tensor], parameters: Sequence[Tensor], starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment of `walk` for the read-out; the state only decays."""
    q_BTHK, log_decay_BTHK = sequences
    dtype = state_BHKV.dtype
    decay_BTHK = log_decay_BTHK.to(dtype).cumsum(1).exp()
    if starts_BT is not None:
        decay_BTHK = decay_BTHK * (starts_BT.long().cumsum(1) == 0)[:, :, None, None]
    y_BHTV = (q_BTHK.to(dtype) * decay_BTHK).transpose(1, 2) @ state_BHKV
    return y_BHTV.transpose(1, 2), state_BHKV * decay_BTHK[:, -1].unsqueeze(-1)
