"""Rows to their experts and back, and matrix products of consecutive groups of rows, each with its own matrix.

PyTorch's grouped product is used where dtype and alignment allow it (rows of a multiple of 16 bytes, dense gradients);
otherwise, float64 included, a loop over the experts. Rows are moved by PyTorch's embedding bag, which reads and writes
every number once: on a CPU several times as fast as selecting rows and multiplying afterwards.

Legend: N tokens, M rows sorted by expert, C = M choices listed by token, E experts, D width in, F width out.
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
        need_x, need_weight, _ = ctx.needs_input_grad
        if ctx.grouped:
            offsets = counts_E.cumsum(0, dtype=torch.int32)
            grad_x = F.grouped_mm(grad_MF, weight_EDF.transpose(1, 2), offs=offsets) if need_x else None
            return grad_x, F.grouped_mm(x_MD.t(), grad_MF, offs=offsets) if need_weight else None, None
        grad_x = torch.empty_like(x_MD) if need_x else None
        grad_weight = torch.zeros_like(weight_EDF) if need_weight else None
        for expert, rows in _groups(counts_E):
            if grad_x is not None:
                torch.mm(grad_MF[rows], weight_EDF[expert].t(), out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(x_MD[rows].t(), grad_MF[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


class GatherRows(torch.autograd.Function):
    """See `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, row_C: Tensor, start_N: Tensor) -> Tensor:
        ctx.save_for_backward(row_C, start_N)
        return _bags(x_ND, token_M, torch.arange(len(token_M) + 1, device=token_M.device))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_C, start_N = ctx.saved_tensors
        return _bags(grads[0], row_C, start_N), None, None, None


class SumRows(torch.autograd.Function):
    """See `sum_rows`."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weight_C: Tensor | None, onto_ND: Tensor | None, *index: Tensor) -> Tensor:
        _, _, row_C, _, start_N = index
        ctx.save_for_backward(rows_MD if weight_C is not None else None, weight_C, *index)
        ctx.onto = onto_ND is not None
        y_ND = _bags(rows_MD, row_C, start_N, weight_C)
        return y_ND if onto_ND is None else y_ND.add_(onto_ND)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND = grads[0].contiguous()
        rows_MD, weight_C, token_M, choice_M, row_C, token_C, start_N = ctx.saved_tensors
        each_M = torch.arange(len(token_M) + 1, device=token_M.device)
        grad_onto = grads[0] if ctx.onto else None
        if weight_C is None:
            return _bags(grad_ND, token_M, each_M), None, grad_onto, *[None] * 5
        grad_rows = _bags(grad_ND, token_M, each_M, weight_C.index_select(0, choice_M))
        grad_weight = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_ND, rows_MD, row_C, start_N, token_C, 0
        )
        return grad_rows, grad_weight, grad_onto, *[None] * 5


def _bags(values_RD: Tensor, index_C: Tensor, start_B: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """For each b the sum of the rows `index[start[b]:start[b + 1]]`, weighted: (B, D)."""
    if not index_C.numel():
        return values_RD.new_zeros(len(start_B) - 1, values_RD.shape[1])
    values_RD, weight_C = values_RD.detach().contiguous(), None if weight_C is None else weight_C.detach()
    return F.embedding_bag(
        index_C, values_RD, start_B, mode="sum", per_sample_weights=weight_C, include_last_offset=True
    )


def _groups(counts_E: Tensor) -> list[tuple[int, slice]]:
    """Experts that have rows, and which."""
    groups, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            groups.append((expert, slice(start, start + count)))
        start += count
    return groups
