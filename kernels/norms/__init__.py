"""Root-mean-square normalisation, plain, gated and grouped.

Origin: B. Zhang and R. Sennrich, arXiv 1910.07467; the gated and grouped form is that of Mamba-2 (arXiv 2405.21060,
github.com/state-spaces/mamba, layernorm_gated.py with norm_before_gate=False).
"""

import torch
from torch import Tensor

from .. import triton_support
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
    if tuple(weight.shape) != (width,):
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, expected ({width},)")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"rms_norm: gate has shape {tuple(gate.shape)}, expected {tuple(x.shape)}")
    if groups < 1 or width % groups:
        raise ValueError(f"rms_norm: width {width} is not a multiple of groups={groups}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    function = RMSNorm
    if triton_support.takes(x, weight, gate):
        from .triton_norm import WIDEST, TritonRMSNorm

        function = TritonRMSNorm if width // groups <= WIDEST else RMSNorm
    return function.apply(x, weight.to(dtype), gate, groups, eps)
