"""Root-mean-square normalisation as an equation, differentiated by autograd. The oracle of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, gate: Tensor | None = None, groups: int = 1
) -> Tensor:
    """weight x / sqrt(mean(x^2) + eps), the mean over each of `groups` pieces of the last dimension."""
    if gate is not None:
        x = x * F.silu(gate)
    pieces = x.unflatten(-1, (groups, -1))
    scale = torch.rsqrt(pieces.square().mean(-1, keepdim=True) + eps)
    return (pieces * scale).flatten(-2) * weight
