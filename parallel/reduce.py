"""Sums over all processes that hold tokens of a step: losses, token counts, balance statistics."""

from __future__ import annotations

from torch import Tensor

from .adjoint import with_adjoint
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
    return with_adjoint(x, lambda own: all_reduce(own, shard.token_group, shard, "global_sum"), lambda grad: grad)
