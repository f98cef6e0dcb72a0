"""Root-mean-square normalisation on a GPU, plain, gated and grouped, in one pass over memory each way.

Takes the place of portable.RMSNorm, argument for argument. A program owns one group of many rows, so that its share of
the weight's gradient is one row of partial sums.

Legend: R rows (all dimensions but the last), G groups, W width of a group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_math import sigmoid
from ..triton_support import interpreting, power_of_two, processors, rows_contiguous

WIDEST = 16384  # elements of a group that a program holds


@triton.jit
def norm_kernel(
    x, weight, gate, y, scales, rows, width, x_stride, gate_stride, eps, GATED: tl.constexpr, W_BLOCK: tl.constexpr
):
    """One group of one row; keeps its 1 / root mean square."""
    row, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    w = tl.arange(0, W_BLOCK)
    mask, begin = w < width, group * width
    v = tl.load(x + (row * x_stride + begin) + w, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gate_W = tl.load(gate + (row * gate_stride + begin) + w, mask=mask, other=0.0).to(tl.float32)
        v *= gate_W * sigmoid(gate_W)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / width + eps)
    tl.store(scales + row * groups + group, scale)
    out = v * scale * tl.load(weight + begin + w, mask=mask, other=0.0)
    tl.store(y + (row * groups + group) * width + w, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_gradient_kernel(
    x, weight, gate, scales, grad_y, grad_x, grad_gate, grad_weight, rows, rows_each, width,
    x_stride, gate_stride, grad_stride, GATED: tl.constexpr, W_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one group of `rows_each` rows, and the sum of their shares of the weight's."""
    program, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    w = tl.arange(0, W_BLOCK)
    mask, begin = w < width, group * width
    weight_W = tl.load(weight + begin + w, mask=mask, other=0.0)
    grad_weight_W = tl.zeros([W_BLOCK], dtype=tl.float32)
    first = program * rows_each
    for i in range(0, rows_each):
        row = first + i
        here = mask & (row < rows)
        x_W = tl.load(x + (row * x_stride + begin) + w, mask=here, other=0.0).to(tl.float32)
        v = x_W
        if GATED:
            gate_W = tl.load(gate + (row * gate_stride + begin) + w, mask=here, other=0.0).to(tl.float32)
            open_W = sigmoid(gate_W)
            v = x_W * gate_W * open_W
        scale = tl.load(scales + row * groups + group, mask=row < rows, other=0.0)
        grad_W = tl.load(grad_y + (row * grad_stride + begin) + w, mask=here, other=0.0).to(tl.float32)
        normalised_W = v * scale
        grad_weight_W += grad_W * normalised_W
        grad_W *= weight_W
        mean = tl.sum(grad_W * normalised_W, axis=0) / width
        grad_v = (grad_W - normalised_W * mean) * scale
        target = (row * groups + group) * width
        if GATED:
            slope_W = open_W * (1.0 + gate_W * (1.0 - open_W))
            tl.store(grad_gate + target + w, (grad_v * x_W * slope_W).to(grad_gate.dtype.element_ty), mask=here)
            grad_v *= gate_W * open_W
        tl.store(grad_x + target + w, grad_v.to(grad_x.dtype.element_ty), mask=here)
    tl.store(grad_weight + (program * groups + group) * width + w, grad_weight_W, mask=mask)


def _rows(x: Tensor) -> Tensor:
    """(R, D), a view where the strides allow it."""
    return rows_contiguous(x.reshape(-1, x.shape[-1]))


def _options(width: int) -> dict[str, int]:
    block = power_of_two(width)
    return {"W_BLOCK": block, "num_warps": 1 if interpreting() else max(1, min(16, block // 512))}


class TritonRMSNorm(torch.autograd.Function):
    """See `rms_norm`; the weight is float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, groups: int, eps: float) -> Tensor:
        x_RD, gate_RD = _rows(x), None if gate is None else _rows(gate)
        rows, width = x_RD.shape[0], x_RD.shape[1] // groups
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scales_RG = weight.new_empty(rows, groups)
        weight = weight.contiguous()
        triton_support.launch(
            norm_kernel, (rows, groups), x_RD, weight, gate_RD, y, scales_RG, rows, width, x_RD.stride(0),
            0 if gate_RD is None else gate_RD.stride(0), eps, GATED=gate is not None, **_options(width),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, gate, scales_RG)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, scales_RG = ctx.saved_tensors
        x_RD, grad_RD, gate_RD = _rows(x), _rows(grads[0]), None if gate is None else _rows(gate)
        rows, groups = scales_RG.shape
        width = x_RD.shape[1] // groups
        programs = min(rows, 3 if interpreting() else 4 * processors(x.device))
        rows_each = -(-rows // programs)
        programs = -(-rows // rows_each)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_weight = weight.new_empty(programs, len(weight))
        triton_support.launch(
            norm_gradient_kernel, (programs, groups), x_RD, weight, gate_RD, scales_RG, grad_RD, grad_x, grad_gate,
            grad_weight, rows, rows_each, width, x_RD.stride(0), 0 if gate_RD is None else gate_RD.stride(0),
            grad_RD.stride(0), GATED=gate is not None, **_options(width),
        )  # fmt: skip
        return grad_x, grad_weight.sum(0), grad_gate, None, None
