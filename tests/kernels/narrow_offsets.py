"""A kernel as none of ours may be: its offsets are 32-bit products. The negative control of the tests of offsets."""

import triton
import triton.language as tl


@triton.jit
def narrow_kernel(x, y, stride, width, BLOCK: tl.constexpr):
    """Copy a row; wrong where row times stride is 2^31 or more."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask = column < width
    tl.store(y + row * width + column, tl.load(x + row * stride + column, mask=mask), mask=mask)
