"""Rotary positions as complex multiplication, in double precision throughout. The oracle of the tests.

Legend: B batch, T tokens, H heads, K head dimension.
"""

import torch
from torch import Tensor


def rotary_reference(x_BTHK: Tensor, positions: Tensor, *, base: float = 10000.0, style: str = "half") -> Tensor:
    """Pair i of a head, seen as a complex number, is multiplied by exp(i position base^(-2i/K))."""
    pairs = x_BTHK.shape[-1] // 2
    if style == "half":
        real, imaginary = x_BTHK[..., :pairs], x_BTHK[..., pairs:]
    else:
        real, imaginary = x_BTHK[..., 0::2], x_BTHK[..., 1::2]
    exponent = torch.arange(pairs, dtype=torch.float64, device=x_BTHK.device) / pairs
    angle = positions.double()[..., None, None] * base**-exponent
    turned = torch.complex(real.double(), imaginary.double()) * torch.polar(torch.ones_like(angle), angle)
    if style == "half":
        return torch.cat((turned.real, turned.imag), -1).to(x_BTHK.dtype)
    return torch.stack((turned.real, turned.imag), -1).flatten(-2).to(x_BTHK.dtype)
