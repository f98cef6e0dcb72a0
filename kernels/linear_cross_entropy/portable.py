"""Linear layer and cross-entropy, a chunk of tokens at a time, with the gradients taken in the forward.

The logits of a chunk are turned into their gradient in place and multiplied at once into the gradients of hidden states
and weights; then they are forgotten. The backward only scales. Chunking in the manner of Liger-Kernel
(github.com/linkedin/Liger-Kernel).

Legend: N tokens, S tokens of a chunk, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import first_order

SCALED_AT_ONCE = 512
"""Rows."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of losses; see `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        bias: Tensor | None,
        chunk_size: int,
        ignore_index: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        need_bias = bias is not None and ctx.needs_input_grad[3]
        dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and need_bias else None
        total = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], chunk_size):
            hidden_SD, targets_S = hidden_ND[start : start + chunk_size], targets_N[start : start + chunk_size]
            logits_SV = F.linear(hidden_SD, weight_VD, bias).to(dtype)
            counted_S = targets_S != ignore_index
            index_S1 = torch.where(counted_S, targets_S, 0).unsqueeze(1)
            target_S1 = logits_SV.gather(1, index_S1)
            highest_S1, highest_index_S1 = logits_SV.max(1, keepdim=True)
            # The logits become probabilities and then their gradient in place: one matrix of them exists, and a row
            # stays in cache while it is normalised. The largest probability is one over the normaliser.
            grad_SV = torch.softmax(logits_SV, 1, out=logits_SV)
            loss_S1 = highest_S1 - target_S1 - grad_SV.gather(1, highest_index_S1).log()
            total += torch.where(counted_S.unsqueeze(1), loss_S1, 0.0).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            grad_SV.scatter_add_(1, index_S1, torch.full_like(target_S1, -1.0))
            # Tokens that do not count are left out of the products rather than of the large matrix.
            if grad_bias is not None:
                grad_bias += torch.mv(grad_SV.t(), counted_S.to(dtype))
            grad_SV, counted_S1 = grad_SV.to(hidden_ND.dtype), counted_S.unsqueeze(1)
            if grad_hidden is not None:
                torch.mm(grad_SV, weight_VD, out=grad_hidden[start : start + chunk_size]).mul_(counted_S1)
            if grad_weight is not None:
                accumulate_(grad_weight, grad_SV.t(), hidden_SD * counted_S1)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VD.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else scaled(grad_hidden, grad),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None,
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            None,
            None,
        )


def scaled(x_ND: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar, in the scalar's dtype and rounded once to that of x; few rows exist in the wider one at a time.

    A factor in bfloat16 would change the whole gradient by up to 0.4%; in PyTorch's own product with a scalar x decides
    the dtype, and the device whether the scalar is rounded to it.
    """
    if x_ND.dtype == factor.dtype:
        return x_ND * factor
    out_ND = torch.empty_like(x_ND)
    for x_SD, out_SD in zip(x_ND.split(SCALED_AT_ONCE), out_ND.split(SCALED_AT_ONCE), strict=True):
        torch.mul(x_SD, factor.view(1), out=out_SD)
    return out_ND


def accumulate_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; half-precision products are summed over chunks in the total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)
