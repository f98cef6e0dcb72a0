"""Rotary position embedding. Origin: J. Su et al., arXiv 2104.09864.

Legend: B batch, T tokens, H heads, K head dimension.
"""

from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype
from .portable import Rotary, angles

__all__ = ["rotary"]


def rotary(x_BTHK: Tensor, positions: Tensor, *, base: float = 10000.0, style: str = "half") -> Tensor:
    """Rotate pair i of every head by position x base^(-2i/K).

    Args:
        x_BTHK: queries or keys, any floating dtype, K even; the result has the same. For a partial rotation pass that
            part of the head.
        positions: (T,) or (B, T), GLOBAL positions in tokens (integers, or floats for interpolated positions).
        style: "half" pairs dimension i with i + K/2 (Llama, GPT-NeoX); "pairs" pairs 2i with 2i + 1 (GPT-J, original).

    Raises:
        ValueError: if K is odd, the style is unknown or positions do not fit.
    """
    batch, length, _, head_dim = x_BTHK.shape
    if head_dim % 2:
        raise ValueError(f"rotary: the head dimension is {head_dim}; it must be even")
    if style not in ("half", "pairs"):
        raise ValueError(f"rotary: style {style!r} is unknown; use 'half' or 'pairs'")
    if tuple(positions.shape) not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"rotary: positions have shape {tuple(positions.shape)}, expected ({length},) or ({batch}, {length})"
        )
    cos, sin = angles(positions, head_dim // 2, base)
    dtype = compute_dtype(x_BTHK)
    function = Rotary
    if triton_support.takes(x_BTHK):
        from .triton_rotary import TritonRotary as function
    return function.apply(x_BTHK, cos.to(dtype), sin.to(dtype), style == "pairs")
