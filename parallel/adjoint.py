"""What most motions are for autograd: a linear map in the forward pass, and its adjoint in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.autograd import first_order

Motion = Callable[[Tensor], Tensor]


def with_adjoint(x: Tensor, motion: Motion, adjoint: Motion) -> Tensor:
    """`motion(x)`, whose gradient is `adjoint` of the result's. Every process of the group calls it together."""
    moved = _WithAdjoint.apply(x, motion, adjoint)
    assert isinstance(moved, Tensor)
    return moved


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, motion: Motion, adjoint: Motion) -> Tensor:
        ctx.adjoint = adjoint
        return motion(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grads[0]), None, None
