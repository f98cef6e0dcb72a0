"""Rows to their experts and back on a GPU, every number read and written once each way. Takes the place of
portable.GatherRows and portable.SumRows.

The inverse map says which rows are a token's, so that sums are taken by one program each and nothing is added to shared
memory. Sums are in float32 whatever the tensors hold.

Legend: N tokens, M rows sorted by expert, C = M choices listed by token, D width.
"""

# The type checker does not know what Triton makes of a kernel's arguments.
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_support import interpreting, power_of_two, rows_contiguous


@triton.jit
def gather_kernel(x, token, y, width, x_stride, BLOCK: tl.constexpr):
    """A piece of a row, copied from its token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    source = tl.load(token + row).to(tl.int64)
    tl.store(y + row * width + column, tl.load(x + source * x_stride + column, mask=mask), mask=mask)


@triton.jit
def sum_kernel(rows, row, start, weight, onto, y, width, rows_stride, onto_stride, BLOCK: tl.constexpr):
    """A piece of a token's sum. `weight` and `onto` may be None."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    if onto is not None:
        total += tl.load(onto + token * onto_stride + column, mask=mask, other=0.0).to(tl.float32)
    for place in range(tl.load(start + token), tl.load(start + token + 1)):
        source = tl.load(row + place).to(tl.int64)
        value = tl.load(rows + source * rows_stride + column, mask=mask, other=0.0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + place).to(tl.float32)
        total += value
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def sum_gradient_kernel(
    grad, rows, token, choice, weight, grad_rows, grad_weight, width, grad_stride, rows_stride, BLOCK: tl.constexpr
):
    """The gradients of a row and of its weight."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(token + row).to(tl.int64)
    place = tl.load(choice + row).to(tl.int64)
    scale = tl.load(weight + place).to(tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < width
        dy = tl.load(grad + target * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(rows + row * rows_stride + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows + row * width + column, (dy * scale).to(grad_rows.dtype.element_ty), mask=mask)
        product += dy * value
    tl.store(grad_weight + place, tl.sum(product, axis=0).to(grad_weight.dtype.element_ty))


def _grid(count: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(16 if interpreting() else 1024, power_of_two(width))
    return (count, -(-width // block)), {"BLOCK": block, "num_warps": 4}


def _gather(x_ND: Tensor, token_M: Tensor) -> Tensor:
    x_ND = rows_contiguous(x_ND)
    y_MD = torch.empty(len(token_M), x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)
    grid, options = _grid(*y_MD.shape)
    triton_support.launch(gather_kernel, grid, x_ND, token_M, y_MD, y_MD.shape[1], x_ND.stride(0), **options)
    return y_MD


def _sum(
    rows_MD: Tensor, row_C: Tensor, start_N: Tensor, weight_C: Tensor | None = None, onto_ND: Tensor | None = None
) -> Tensor:
    rows_MD = rows_contiguous(rows_MD)
    onto_ND = None if onto_ND is None else rows_contiguous(onto_ND)
    weight_C = None if weight_C is None else weight_C.contiguous()
    y_ND = torch.empty(len(start_N) - 1, rows_MD.shape[1], dtype=rows_MD.dtype, device=rows_MD.device)
    grid, options = _grid(*y_ND.shape)
    triton_support.launch(
        sum_kernel, grid, rows_MD, row_C, start_N, weight_C, onto_ND, y_ND, y_ND.shape[1], rows_MD.stride(0),
        0 if onto_ND is None else onto_ND.stride(0), **options,
    )  # fmt: skip
    return y_ND


class TritonGatherRows(torch.autograd.Function):
    """See `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, row_C: Tensor, start_N: Tensor) -> Tensor:
        ctx.save_for_backward(row_C, start_N)
        return _gather(x_ND, token_M)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grads[0], *ctx.saved_tensors), None, None, None


class TritonSumRows(torch.autograd.Function):
    """See `sum_rows`."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weight_C: Tensor | None, onto_ND: Tensor | None, *index: Tensor) -> Tensor:
        token_M, choice_M, row_C, _, start_N = index
        ctx.onto, ctx.weighted = onto_ND is not None, weight_C is not None
        ctx.save_for_backward(token_M, *((rows_MD, weight_C, choice_M) if ctx.weighted else ()))
        return _sum(rows_MD, row_C, start_N, weight_C, onto_ND)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND = rows_contiguous(grads[0])
        grad_onto = grads[0] if ctx.onto else None
        if not ctx.weighted:
            return _gather(grad_ND, *ctx.saved_tensors), None, grad_onto, *[None] * 5
        token_M, rows_MD, weight_C, choice_M = ctx.saved_tensors
        rows_MD, weight_C = rows_contiguous(rows_MD), weight_C.contiguous()
        grad_rows = torch.empty(rows_MD.shape, dtype=rows_MD.dtype, device=rows_MD.device)
        grad_weight = torch.empty(weight_C.shape, dtype=weight_C.dtype, device=weight_C.device)
        (count, _), options = _grid(*rows_MD.shape)
        triton_support.launch(
            sum_gradient_kernel, (count,), grad_ND, rows_MD, token_M, choice_M, weight_C, grad_rows, grad_weight,
            rows_MD.shape[1], grad_ND.stride(0), rows_MD.stride(0), **options,
        )  # fmt: skip
        return grad_rows, grad_weight, grad_onto, *[None] * 5
