"""silu(gate) * up on a GPU, in one pass over memory each way. Takes the place of portable.SwiGLU.

Legend: R rows (all dimensions but the last), D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_math import sigmoid
from ..triton_support import interpreting, power_of_two, rows_contiguous


@triton.jit
def swiglu_kernel(gate, up, y, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    """A piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (g * sigmoid(g) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_gradient_kernel(
    gate, up, grad_y, grad_gate, grad_up, width, gate_stride, up_stride, grad_stride, BLOCK: tl.constexpr
):
    """Both gradients of a piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(grad_y + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    opened = sigmoid(g)
    slope = opened * (1.0 + g * (1.0 - opened))
    tl.store(grad_gate + row * width + column, (dy * u * slope).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + row * width + column, (dy * g * opened).to(grad_up.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    return rows_contiguous(x.reshape(-1, x.shape[-1]))


def _grid(x_RD: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    block = min(16 if interpreting() else 1024, power_of_two(x_RD.shape[1]))
    return (x_RD.shape[0], -(-x_RD.shape[1] // block)), {"BLOCK": block, "num_warps": 4}


class TritonSwiGLU(torch.autograd.Function):
    """See `swiglu`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        gate_RD, up_RD = _rows(gate), _rows(up)
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grid, options = _grid(gate_RD)
        strides = (gate_RD.stride(0), up_RD.stride(0))
        triton_support.launch(swiglu_kernel, grid, gate_RD, up_RD, y, gate_RD.shape[1], *strides, **options)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate_RD, up_RD, grad_RD = _rows(gate), _rows(up), _rows(grads[0])
        grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        grid, options = _grid(gate_RD)
        triton_support.launch(
            swiglu_gradient_kernel, grid, gate_RD, up_RD, grad_RD, grad_gate, grad_up, gate_RD.shape[1],
            gate_RD.stride(0), up_RD.stride(0), grad_RD.stride(0), **options,
        )  # fmt: skip
        return grad_gate, grad_up
