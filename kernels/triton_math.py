"""Pieces that several Triton kernels share. Everything is computed in float32, whatever the tensors hold.

A tile of a few tokens is a tuple of rows, unrolled by the compiler: registers of a sequential scan can then be read in
either direction, without a scan over a third dimension and without scratch memory.
"""

# The type checker takes triton.language.static_range for something that cannot be iterated.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from .triton_support import interpreting

_DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """What operands of matrix products are rounded to: the tensors' own dtype. The interpreter multiplies in float32,
    since its half-precision products are wrong."""
    return tl.float32 if interpreting() else _DOT_TYPES[dtype]


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to float32 rounding for every x: no logarithm, hence no cancellation near zero."""
    small = tl.exp(-tl.abs(x))  # log(1 + e) = 2 artanh(e / (2 + e)) with an argument of at most 1/3
    ratio = small / (2.0 + small)
    square = ratio * ratio
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return tl.maximum(x, 0.0) + 2.0 * ratio * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def load_rows(x, stride, first, stop, columns, mask, TILE: tl.constexpr):
    """TILE rows from `first` (64-bit) on, as float32; zeros at and behind `stop`."""
    rows = ()
    for j in tl.static_range(TILE):
        here = mask & (first + j < stop)
        rows = rows + (tl.load(x + (first + j) * stride + columns, mask=here, other=0.0).to(tl.float32),)  # noqa: RUF005
    return rows


@triton.jit
def load_keeps(starts, first, stop, TILE: tl.constexpr):
    """For TILE tokens: 0.0 where a document starts and 1.0 elsewhere. `starts` None: all 1.0."""
    keeps = ()
    for j in tl.static_range(TILE):
        if starts is None:
            keeps = keeps + (1.0,)  # noqa: RUF005
        else:
            start = tl.load(starts + first + j, mask=first + j < stop, other=0)
            keeps = keeps + (tl.where(start != 0, 0.0, 1.0),)  # noqa: RUF005
    return keeps


@triton.jit
def load_tile(x, rows, row_stride, row_mask, columns, column_stride, column_mask, DOT: tl.constexpr):
    """A block of a matrix, zero outside, as an operand of products; the caller may exchange rows and columns."""
    at = x + rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(at, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32).to(DOT)
