"""Matrix products of consecutive groups of rows, each with its own matrix.

PyTorch's grouped product is used where dtype and alignment allow it (rows of a multiple of 16 bytes, dense gradients);
otherwise, float64 included, a loop over the experts.

Legend: M rows sorted by expert, E experts, D width in, F width out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import first_order


def _aligned(x_MD: Tensor, weight_EDF: Tensor) -> bool:
    """What torch.nn.functional.grouped_mm asks of its operands, for the product and for both of its gradients."""
    allowed = (torch.bfloat16,) if x_MD.device.type != "cpu" else (torch.bfloat16, torch.float32)
    sixteen_bytes = all((size * x_MD.element_size()) % 16 == 0 for size in weight_EDF.shape[1:])
    return x_MD.dtype in allowed and x_MD.dtype == weight_EDF.dtype and sixteen_bytes and min(x_MD.shape) > 0


class GroupedMatmul(torch.autograd.Function):
    """See `grouped_matmul`."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
        x_MD, weight_EDF = x_MD.contiguous(), weight_EDF.contiguous()
        ctx.grouped = _aligned(x_MD, weight_EDF)
        ctx.save_for_backward(x_MD, weight_EDF, counts_E)
        if ctx.grouped:
            return F.grouped_mm(x_MD, weight_EDF, offs=counts_E.cumsum(0, dtype=torch.int32))
        y_MF = x_MD.new_empty(x_MD.shape[0], weight_EDF.shape[2])
        for expert, rows in _groups(counts_E):
            torch.mm(x_MD[rows], weight_EDF[expert], out=y_MF[rows])
        return y_MF

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MF,) = grads
        x_MD, weight_EDF, counts_E = ctx.saved_tensors
        grad_MF = grad_MF.contiguous()
        if ctx.grouped:
            offsets = counts_E.cumsum(0, dtype=torch.int32)
            grad_x = F.grouped_mm(grad_MF, weight_EDF.transpose(1, 2), offs=offsets)
            return grad_x, F.grouped_mm(x_MD.t(), grad_MF, offs=offsets), None
        grad_x, grad_weight = torch.empty_like(x_MD), torch.zeros_like(weight_EDF)
        for expert, rows in _groups(counts_E):
            torch.mm(grad_MF[rows], weight_EDF[expert].t(), out=grad_x[rows])
            torch.mm(x_MD[rows].t(), grad_MF[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _groups(counts_E: Tensor) -> list[tuple[int, slice]]:
    """Experts that have rows, and which."""
    groups, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups
