"""Sums over all processes that hold tokens of a step: losses, token counts, balance statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .collectives import all_reduce
from .groups import group_size
from .shard import SequenceShard


def global_sum(x: Tensor, shard: SequenceShard) -> Tensor:
    """`x` summed over `shard.token_group`; the backward is the identity.

    Every process computes the same global loss from the sum, and its backward yields the part of the gradient that
    runs through its own `x`: a partial gradient. Summed over processes (as FSDP does) these are the true gradient.
    """
    if group_size(shard.token_group) == 1:
        return x
    result = _GlobalSum.apply(x, shard)
    assert isinstance(result, Tensor)
    return result


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, shard: SequenceShard) -> Tensor:
        return all_reduce(x, shard.token_group, shard, "global_sum")

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
