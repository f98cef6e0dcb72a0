"""Products of rows of tokens with a filter's Toeplitz matrices on a GPU. See toeplitz.py for the plan of the whole.

A program owns one channel: the matrices are gathered from its taps on chip and never exist in memory, and serve for a
block of rows. Float32 operands are split in three TF32 products each, which keeps float32 accuracy on tensor cores.

Legend: D channels, W taps, R rows, Q tokens of a row, J rows that spill over, I diagonals of a matrix.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..triton_math import dot_type
from ..triton_support import interpreting


@triton.jit
def band_kernel(
    x, taps, depth, y, rows, out_rows, taps_each, spill,
    Q: tl.constexpr, R_BLOCK: tl.constexpr, DOT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """y_r = sum_j x_{r + J - j} T_j for `out_rows` rows r. REVERSE: x_r = sum_j y_{r - J + j} T_j^T.

    Rows of the source at and beyond its `rows`, or before the first, are zero. `depth` belongs to the rows of y.
    """
    d = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64) * R_BLOCK + tl.arange(0, R_BLOCK)
    s, t = tl.arange(0, Q), tl.arange(0, Q)
    x += d * rows * Q
    taps += d * taps_each
    sum_RQ = tl.zeros([R_BLOCK, Q], dtype=tl.float32)
    for j in range(0, spill + 1):
        if REVERSE:
            source_R = r - spill + j
            lag_QQ = j * Q + s[:, None] - t[None, :]
        else:
            source_R = r + spill - j
            lag_QQ = j * Q + t[None, :] - s[:, None]
        inside_R = (source_R >= 0) & (source_R < rows) & (r < out_rows)
        if depth is not None:
            if REVERSE:
                inside_R = inside_R & (tl.load(depth + source_R, mask=inside_R, other=-1) >= j)
            else:
                inside_R = inside_R & (tl.load(depth + r, mask=inside_R, other=-1) >= j)
        x_RQ = tl.load(x + source_R[:, None] * Q + s[None, :], mask=inside_R[:, None], other=0.0)
        taps_QQ = tl.load(taps + lag_QQ, mask=(lag_QQ >= 0) & (lag_QQ < taps_each), other=0.0)
        sum_RQ += tl.dot(x_RQ.to(DOT), taps_QQ.to(DOT), input_precision="tf32x3")
    target = y + (d * out_rows + r)[:, None] * Q + t[None, :]
    tl.store(target, sum_RQ.to(y.dtype.element_ty), mask=(r < out_rows)[:, None])


@triton.jit
def band_taps_kernel(
    x, grad, depth, scratch, grad_taps, rows, out_rows, taps_each, spill, rows_each,
    Q: tl.constexpr, R_BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What `rows_each` rows of y add to the gradient of one channel's T_j, summed along the diagonals of equal lag.

    The sums come from reading the matrix back from scratch memory, each row shifted by one place more than the last.
    """
    j, d = tl.program_id(1), tl.program_id(2).to(tl.int64)
    split = tl.program_id(0).to(tl.int64)
    begin, stop = split * rows_each, tl.minimum(split * rows_each + rows_each, out_rows)
    q, i = tl.arange(0, Q), tl.arange(0, 2 * Q)
    x += d * rows * Q
    grad += d * out_rows * Q
    sum_QQ = tl.zeros([Q, Q], dtype=tl.float32)
    for block in range(0, tl.cdiv(rows_each, R_BLOCK)):
        r = begin + block * R_BLOCK + tl.arange(0, R_BLOCK)
        mask_R = r < stop
        reads_R = mask_R
        if depth is not None:
            reads_R = reads_R & (tl.load(depth + r, mask=mask_R, other=-1) >= j)
        x_QR = tl.load(x + (r + spill - j)[None, :] * Q + q[:, None], mask=reads_R[None, :], other=0.0)
        grad_RQ = tl.load(grad + r[:, None] * Q + q[None, :], mask=mask_R[:, None], other=0.0)
        sum_QQ += tl.dot(x_QR.to(DOT), grad_RQ.to(DOT), input_precision="tf32x3")
    program = (split * tl.num_programs(1) + j) * tl.num_programs(2) + d
    scratch += program * Q * Q
    tl.store(scratch + q[:, None] * Q + q[None, :], sum_QQ)
    tl.debug_barrier()
    column_QI = i[None, :] + q[:, None] - (Q - 1)  # of row s, for the diagonal t - s = i - (Q - 1)
    inside_QI = (column_QI >= 0) & (column_QI < Q)
    shifted_QI = tl.load(scratch + q[:, None] * Q + column_QI, mask=inside_QI, other=0.0)
    lag_I = j * Q + i - (Q - 1)
    target = grad_taps + (split * tl.num_programs(2) + d) * taps_each + lag_I
    inside_I = (lag_I >= 0) & (lag_I < taps_each)
    tl.atomic_add(target, tl.sum(shifted_QI, axis=0), mask=inside_I, sem="relaxed")


class TritonProducts:
    """See `toeplitz_products.Products`."""

    def __init__(self, taps_DW: Tensor, dtype: torch.dtype) -> None:
        taps = taps_DW.shape[1]
        self.row = 16 if interpreting() else 32 if taps <= 33 else 64
        self.taps_DW, self.spill, self.dtype = taps_DW.contiguous(), -(-(taps - 1) // self.row), dtype

    def _options(self) -> dict[str, Any]:
        rows = 16 if interpreting() else 64
        return {"Q": self.row, "R_BLOCK": rows, "DOT": dot_type(self.dtype), "num_warps": 4, "num_stages": 2}

    def _apply(self, x_DRQ: Tensor, depth_R: Tensor | None, rows: int, *, reverse: bool) -> Tensor:
        y_DRQ = x_DRQ.new_empty(x_DRQ.shape[0], rows, self.row)
        options = self._options()
        triton_support.launch(
            band_kernel, (-(-rows // options["R_BLOCK"]), len(x_DRQ)), x_DRQ, self.taps_DW, depth_R, y_DRQ,
            x_DRQ.shape[1], rows, self.taps_DW.shape[1], self.spill, REVERSE=reverse, **options,
        )  # fmt: skip
        return y_DRQ

    def forward(self, x_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        return self._apply(x_DRQ, depth_R, x_DRQ.shape[1] - self.spill, reverse=False)

    def to_inputs(self, grad_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        return self._apply(grad_DRQ, depth_R, grad_DRQ.shape[1] + self.spill, reverse=True)

    def to_taps(self, x_DRQ: Tensor, grad_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        channels, rows, _ = grad_DRQ.shape
        matrices, options = self.spill + 1, self._options()
        blocks = -(-rows // options["R_BLOCK"])
        wanted = 8 * triton_support.processors(x_DRQ.device)
        splits = max(1, min(blocks, wanted // (channels * matrices)))
        rows_each = -(-blocks // splits) * options["R_BLOCK"]
        splits = -(-rows // rows_each)
        # Two matrices add to each lag: a sum of two numbers is the same in either order.
        grad_taps = self.taps_DW.new_zeros(splits, *self.taps_DW.shape)
        scratch = self.taps_DW.new_empty(splits * matrices * channels, self.row, self.row)
        triton_support.launch(
            band_taps_kernel, (splits, matrices, channels), x_DRQ, grad_DRQ, depth_R, scratch, grad_taps,
            x_DRQ.shape[1], rows, self.taps_DW.shape[1], self.spill, rows_each, **options,
        )  # fmt: skip
        return grad_taps.sum(0)
