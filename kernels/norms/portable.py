"""Root-mean-square normalisation that keeps its inputs and one number per group, nothing of the size of x more.

With r = (mean(x^2) + eps)^-1/2 and g the gradient of the output times the weight, dx = r (g - x r^2 mean(g x)).
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order


def _gated(x: Tensor, gate: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor:
    """x, times silu(gate) if there is one, in the dtype of the computation, its last dimension cut into groups."""
    x = x.to(dtype)
    if gate is not None:
        x = x * torch.nn.functional.silu(gate.to(dtype))
    return x.unflatten(-1, (groups, -1))


class RMSNorm(torch.autograd.Function):
    """See `rms_norm`; the weight has the dtype of the computation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, groups: int, eps: float) -> Tensor:
        pieces = _gated(x, gate, groups, weight.dtype)
        scale = torch.linalg.vector_norm(pieces, dim=-1, keepdim=True).square_().div_(pieces.shape[-1])
        scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, gate, scale)
        ctx.groups = groups
        return (pieces * scale).flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, gate, scale = ctx.saved_tensors
        pieces = _gated(x, gate, ctx.groups, weight.dtype)
        grad = grad.to(weight.dtype)
        normalised = pieces * scale
        grad_weight = (grad * normalised.flatten(-2)).reshape(-1, len(weight)).sum(0)
        grad_pieces = (grad * weight).unflatten(-1, (ctx.groups, -1))
        mean = (grad_pieces * normalised).mean(-1, keepdim=True)
        grad_input = normalised.mul_(-mean).add_(grad_pieces).mul_(scale).flatten(-2)
        grad_gate = None
        if gate is not None:
            wide_gate = gate.to(weight.dtype)
            grad_gate = torch.ops.aten.silu_backward(grad_input * x.to(weight.dtype), wide_gate).to(gate.dtype)
            grad_input = grad_input * torch.nn.functional.silu(wide_gate)
        return grad_input.to(x.dtype), grad_weight, grad_gate, None, None
