"""Exact causal attention as a sum of tiles, each by a fused kernel, joined by their log-sum-exps.

PyTorch has fused kernels that return the log-sum-exp and have a backward: the CPU's, and for half types on GPUs
`flash`; elsewhere `blockwise` serves. The backward of each tile takes output and log-sum-exp over all tiles of its
queries, as in ring attention.

Legend: B batch, T queries, S keys, H query heads, G key and value heads, K head dimension.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import compute_dtype
from ..autograd import first_order
from ..triton_support import rows_contiguous
from . import blockwise, flash
from .tiles import Tile, tiles


def _as_kernels_read(x_BTHK: Tensor) -> Tensor:
    """(B, H, T, K) with dense heads: PyTorch's fused kernel takes the last dimension for dense without looking."""
    return rows_contiguous(x_BTHK).transpose(1, 2)


def _forward_tile(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_as_kernels_read(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        form = flash if flash.takes(q) else blockwise
        out, lse = form.tile_forward(q, k, v, causal, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward_tile(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = (_as_kernels_read(x) for x in (grad, q, k, v, out))
    lse = lse.transpose(1, 2)
    if q.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    else:
        form = flash if flash.takes(q) else blockwise
        grads = form.tile_backward(grad, q, k, v, out, lse, causal, scale)
    grad_q, grad_k, grad_v = grads
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2)


def merge_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Join attention over two sets of keys, in place: out_BTHK and lse_BTH, of one dtype, become those over both."""
    out.lerp_(new_out.to(out.dtype), torch.sigmoid(new_lse - lse).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, new_lse))


@dataclass(frozen=True)
class Positions:
    """Where queries and keys stand: the global position of the first of each, and each query's document."""

    query_start: int
    key_start: int
    document_begin: Tensor | None

    def tiles(self, q_BTHK: Tensor, k_BSGK: Tensor) -> list[Tile]:
        batch, length = q_BTHK.shape[:2]
        return tiles(batch, length, k_BSGK.shape[1], self.query_start, self.key_start, self.document_begin)


def nothing_seen(q_BTHK: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that have seen no key yet; both float32, or float64: half types would round every join."""
    dtype = compute_dtype(q_BTHK)
    lse = torch.full(q_BTHK.shape[:3], -torch.inf, dtype=dtype, device=q_BTHK.device)
    return torch.zeros_like(q_BTHK, dtype=dtype, memory_format=torch.contiguous_format), lse


def attend_(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, where: Positions, scale: float) -> None:
    """Let the queries see more keys, in place: out_BTHK and lse_BTH become those over the keys seen so far."""
    for tile in where.tiles(q, k):
        rows, queries = tile.rows, tile.queries
        new_out, new_lse = _forward_tile(q[rows, queries], k[rows, tile.keys], v[rows, tile.keys], tile.causal, scale)
        merge_(out[rows, queries], lse[rows, queries], new_out, new_lse)


def attend_backward_(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    where: Positions,
    scale: float,
) -> None:
    """Add to the gradients of (q, k, v) what these keys contribute; `out` and `lse` are those over all keys."""
    head_dim = operands[0].shape[-1]
    for tile in where.tiles(operands[0], operands[1]):
        parts = _tile_operands(tile, grad_out, grad_lse, *operands, out)
        pieces = _backward_tile(*parts, lse[tile.rows, tile.queries], tile.causal, scale)
        for grad, piece, span in zip(grads, pieces, (tile.queries, tile.keys, tile.keys), strict=True):
            grad[tile.rows, span] += piece[..., :head_dim]


class Attention(torch.autograd.Function):
    """See `attention`."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, where: Positions, scale: float
    ) -> tuple[Tensor, Tensor]:
        ctx.where, ctx.scale = where, scale
        ctx.set_materialize_grads(False)
        out, lse = nothing_seen(q_BTHK)
        attend_(out, lse, q_BTHK, k_BSGK, v_BSGK, where, scale)
        out = out.to(q_BTHK.dtype)
        ctx.save_for_backward(q_BTHK, k_BSGK, v_BSGK, out, lse)
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype)
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        attend_backward_((grad_q, grad_k, grad_v), grad_out, grad_lse, (q, k, v), out, lse, ctx.where, ctx.scale)
        return grad_q, grad_k, grad_v, None, None


def _tile_operands(
    tile: Tile, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad, q, k, v, out) of a tile; with a gradient of the log-sum-exp, each with one dimension more.

    A kernel forms dS = P (dP - rowsum(grad out)), and a gradient of the log-sum-exp adds P grad_lse. One more dimension
    that holds -grad_lse in the gradient, one in the output and zero elsewhere turns the row sum into just that.
    """
    grad_piece, out_piece = grad_out[tile.rows, tile.queries], out[tile.rows, tile.queries]
    q_piece, k_piece, v_piece = q[tile.rows, tile.queries], k[tile.rows, tile.keys], v[tile.rows, tile.keys]
    if grad_lse is None:
        return grad_piece, q_piece, k_piece, v_piece, out_piece
    column = -grad_lse[tile.rows, tile.queries, :, None].to(grad_piece.dtype)
    q_piece, k_piece, v_piece = (F.pad(x, (0, 1)) for x in (q_piece, k_piece, v_piece))
    return torch.cat((grad_piece, column), -1), q_piece, k_piece, v_piece, F.pad(out_piece, (0, 1), value=1.0)
