"""The gated unit between the matrices of a SwiGLU layer. Origin: N. Shazeer, arXiv 2002.05202."""

from torch import Tensor

from .. import triton_support
from .portable import SwiGLU

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; both of one shape and dtype.

    Raises:
        ValueError: if shapes or dtypes differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {tuple(gate.shape)} {gate.dtype} and up is {tuple(up.shape)} {up.dtype}; they must agree"
        )
    function = SwiGLU
    if triton_support.takes(gate, up):
        from .triton_swiglu import TritonSwiGLU as function
    return function.apply(gate, up)
