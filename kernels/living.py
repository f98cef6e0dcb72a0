"""How far a state that enters a sequence can still be seen in its outputs, when decays depend on the data.

Legend: B batch, T tokens, H heads.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .documents import first_start

_LEAST = 64  # shorter groups would cost more calls than they save


def negligible_exponent(dtype: torch.dtype) -> float:
    """exp of minus this is far below `dtype`'s epsilon: its 1.5th power (float32 4e-11, float64 3e-24)."""
    return -1.5 * math.log(torch.finfo(dtype).eps)


def suffix_sums(grad_sums_BT: Tensor) -> Tensor:
    """Gradients of numbers from those of their running sums: each counts at its own token and at all later ones."""
    return grad_sums_BT.flip(1).cumsum(1).flip(1)


class NothingLeft(torch.autograd.Function):
    """`zeros`, as a function of tensors it does not depend on: their gradient is zero, not missing.

    Where an entering state cannot be seen at all, a process of a split sequence must still pass a gradient on, or its
    neighbours would wait for ever.
    """

    @staticmethod
    def forward(ctx: Any, zeros: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return zeros.view_as(zeros)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class _AddToHeads(torch.autograd.Function):
    """See `add_to_heads`."""

    @staticmethod
    def forward(ctx: Any, y_BTHP: Tensor, groups: list[tuple[Tensor, int]], *parts_BRKP: Tensor) -> Tensor:
        ctx.groups = groups
        for (heads, tokens), part in zip(groups, parts_BRKP, strict=True):
            y_BTHP[:, :tokens].index_add_(2, heads, part)
        ctx.mark_dirty(y_BTHP)
        return y_BTHP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = [grads[0][:, :tokens].index_select(2, heads) for heads, tokens in ctx.groups]
        return grads[0], None, *parts


def add_to_heads(y_BTHP: Tensor, groups: list[tuple[Tensor, int]], parts_BRKP: list[Tensor]) -> Tensor:
    """`y_BTHP`, with a part added to the first R tokens of each group's K heads, in place.

    PyTorch's own in-place writes to a slice copy the whole gradient once for each in the backward; here none is copied.
    """
    result = _AddToHeads.apply(y_BTHP, groups, *parts_BRKP)
    assert isinstance(result, Tensor)
    return result


def reach_of_heads(log_decay_BTH: Tensor, dtype: torch.dtype, starts_BT: Tensor | None) -> Tensor:
    """(H,) int64: tokens after which each head's state is less than epsilon to the power 1.5 of what entered.

    The slowest sequence of the batch decides; no token at or after its first document start counts.
    """
    batch, length, heads = log_decay_BTH.shape
    if not (batch and length):
        return torch.zeros(heads, dtype=torch.long, device=log_decay_BTH.device)
    alive_BTH = log_decay_BTH.detach().double().cumsum(1) > -negligible_exponent(dtype)
    tokens_T = torch.arange(1, length + 1, device=log_decay_BTH.device)
    if starts_BT is not None:
        alive_BTH = alive_BTH & (tokens_T <= first_start(starts_BT).unsqueeze(1)).unsqueeze(2)
    return (alive_BTH * tokens_T[:, None]).amax((0, 1))


def groups_of_heads(reach_H: Tensor) -> list[tuple[Tensor, int]]:
    """Heads that live about equally long, and how long; one group for each power of two. Dead heads are in none."""
    groups = []
    level_H = torch.ceil(torch.log2(reach_H.clamp_min(_LEAST).double())).long()
    for level in level_H.unique().tolist():
        heads = (level_H == level).nonzero().squeeze(1)
        if tokens := int(reach_H[heads].max()):
            groups.append((heads, tokens))
    return groups
