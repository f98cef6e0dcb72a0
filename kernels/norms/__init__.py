"""Root-mean-square normalisation, plain, gated and grouped.

Origin: B. Zhang and R. Sennrich, arXiv 1910.07467; the gated and grouped form is that of Mamba-2 (arXiv 2405.21060,
github.com/state-spaces/mamba, layernorm_gated.py with norm_before_gate=False).
"""

from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from .portable import RMSNorm

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, gate: Tensor | None = None, groups: int = 1) -> Tensor:
    """weight v / sqrt(mean(v^2) + eps) with v = x, or v = x silu(gate).

    Args:
        x: (..., D), any floating dtype; the result has the same. Half precision is computed in float32.
        weight: (D,). gate: the shape of x, applied before the norm.
        groups: the mean runs over each of this many equal pieces of the last dimension.

    Raises:
        ValueError: if shapes do not agree or D is not a multiple of `groups`.
    """
    width = x.shape[-1]
    expect_shape("rms_norm", "weight", weight, (width,))
    expect_shape("rms_norm", "gate", gate, tuple(x.shape))
    if groups < 1 or width % groups:
        raise ValueError(f"rms_norm: width {width} is not a multiple of groups={groups}")
    dtype = compute_dtype(x)
    function = RMSNorm
    if triton_support.takes(x, weight, gate):
        from .triton_norm import WIDEST, TritonRMSNorm

        function = TritonRMSNorm if width // groups <= WIDEST else RMSNorm
    return function.apply(x, weight.to(dtype), gate, groups, eps)
