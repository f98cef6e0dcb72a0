"""One tile of attention by plain matrix products, a block of queries at a time: for devices other than the CPU.

Legend: B batch, H query heads, G key and value heads, R = H / G, T queries, S keys, Q queries of a block, K head
dimension.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..arguments import compute_dtype

_SCORE_ELEMENTS = 1 << 25  # scores held at a time


def _scores(q_BHTK: Tensor, k_BGSK: Tensor, causal: bool, scale: float) -> Iterator[tuple[slice, int, Tensor]]:
    """Blocks of queries: which, how many keys they reach, and scores (B, G, R, Q, S) in float32 or float64."""
    batch, heads, length, head_dim = q_BHTK.shape
    kv_heads, keys = k_BGSK.shape[1:3]
    q_BGRTK = q_BHTK.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    size = max(16, _SCORE_ELEMENTS // max(1, batch * heads * keys))
    dtype = compute_dtype(q_BHTK)
    for start in range(0, length, size):
        stop = min(start + size, length)
        reach = stop if causal else keys
        k_BG1SK = k_BGSK[:, :, None, :reach]
        scores = torch.matmul(q_BGRTK[:, :, :, start:stop], k_BG1SK.transpose(-1, -2)).to(dtype) * scale
        if causal:
            query = torch.arange(start, stop, device=scores.device)[:, None]
            scores.masked_fill_(torch.arange(reach, device=scores.device) > query, -torch.inf)
        yield slice(start, stop), reach, scores


def tile_forward(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out_BHTK, lse_BHT)."""
    out_BHTK = torch.empty_like(q_BHTK)
    lses = []
    for block, reach, scores in _scores(q_BHTK, k_BGSK, causal, scale):
        lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse).exp_().to(v_BGSK.dtype)
        out_BHTK[:, :, block] = torch.matmul(weights, v_BGSK[:, :, None, :reach]).flatten(1, 2)
        lses.append(lse.squeeze(-1).flatten(1, 2))
    return out_BHTK, torch.cat(lses, 2)


def tile_backward(
    grad_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and log-sum-exp over ALL tiles of these queries."""
    grad_q, grad_k, grad_v = torch.empty_like(q_BHTK), torch.zeros_like(k_BGSK), torch.zeros_like(v_BGSK)
    heads = (k_BGSK.shape[1], q_BHTK.shape[1] // k_BGSK.shape[1])
    for block, reach, scores in _scores(q_BHTK, k_BGSK, causal, scale):
        grad, q, out = (x[:, :, block].unflatten(1, heads) for x in (grad_BHTK, q_BHTK, out_BHTK))
        weights = scores.sub_(lse_BHT[:, :, block, None].unflatten(1, heads)).exp_()
        k, v = k_BGSK[:, :, None, :reach], v_BGSK[:, :, None, :reach]
        grad_v[:, :, :reach] += torch.matmul(weights.to(grad.dtype).transpose(-1, -2), grad).sum(2)
        grad_scores = torch.matmul(grad, v.transpose(-1, -2)).to(weights.dtype)
        grad_scores.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
        grad_scores = grad_scores.to(q.dtype)
        grad_q[:, :, block] = torch.matmul(grad_scores, k).flatten(1, 2)
        grad_k[:, :, :reach] += torch.matmul(grad_scores.transpose(-1, -2), q).sum(2)
    return grad_q, grad_k, grad_v
