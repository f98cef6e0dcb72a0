"""StripedHyena-7B's Hyena operator: a filter of a few complex modes between gates (togethercomputer/stripedhyena).

    q, k, v = conv3(in_proj(x));  w = k * v;  h_t = Re sum_n residue_n pole_n^t;  y = out_proj(q * (h * w + D w))

A Hyena filter distilled to modes (arXiv 2310.18780): between shards, and while decoding, a state of N complex numbers a
channel stands for the whole past. q, k and v of one head lie side by side in the streams.

Shapes: B batch, T local tokens, D channels, N modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ...parallel import ModalFilter, SequenceShard, convolve
from ..parameters import at_least_float32, normal
from .base import LayerPlace
from .gated_convolution import GatedConvolution, GatedConvolutionOptions
from .modal import as_complex, complex_dtype, modal_flops, modal_prefill, modal_step


class ModalHyenaOptions(GatedConvolutionOptions):
    """StripedHyena-7B's operator.

    Attributes:
        heads: how the streams are laid out, nothing more.
        modes: complex exponentials whose sum a filter is.
    """

    heads: int = Field(default=1, ge=1)
    modes: int = Field(default=2, ge=1)

    def build(self, place: LayerPlace) -> ModalHyena:
        return ModalHyena(self, place)


class ModalHyena(GatedConvolution):
    """`poles` and `residues` (D, N, 2), real and imaginary parts, as released; `D` (D,)."""

    biased = True

    def __init__(self, options: ModalHyenaOptions, place: LayerPlace) -> None:
        super().__init__(options, place)
        if place.width % options.heads:
            raise ValueError(
                f"modal_hyena: width {place.width} is not divisible by {options.heads} heads; use a divisor"
            )
        self.heads = options.heads
        shape = (place.width, options.modes, 2)
        self.poles = self.parameter("poles", shape, slowly_turning_poles, decay=False)
        self.residues = self.parameter("residues", shape, normal(0.1 / math.sqrt(options.modes)), decay=False)
        self.D = self.parameter("D", (place.width,), normal(1.0))

    def split(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each head's channels are q, then k, then v."""
        q, k, v = streams.unflatten(-1, (self.heads, 3, -1)).unbind(-2)
        return q.flatten(-2), k.flatten(-2), v.flatten(-2)

    def modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithms of the poles, residues, direct term."""
        log_poles_DN = torch.log(as_complex(at_least_float32(self.poles)))
        # nothing keeps the parameters inside the unit circle; the filter stays on it rather than overflow
        log_poles_DN = torch.complex(log_poles_DN.real.clamp(max=0), log_poles_DN.imag)
        return log_poles_DN, as_complex(at_least_float32(self.residues)), at_least_float32(self.D)

    def convolution(self, u_BTD: Tensor, shard: SequenceShard) -> Tensor:
        log_poles_DN, residues_DN, skip_D = self.modes()
        return convolve(u_BTD, ModalFilter(log_poles_DN, residues_DN), shard, skip=skip_D)

    def convolution_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, *self.poles.shape[:2], device=device, dtype=complex_dtype(dtype))

    def convolution_prefill(self, u_BTD: Tensor, state: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
        return modal_prefill(u_BTD, state, *self.modes(), shard)

    def convolution_step(self, u_BD: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return modal_step(u_BD, state, *self.modes())

    def convolution_flops(self) -> float:
        return modal_flops(*self.poles.shape[:2], is_complex=True)


def slowly_turning_poles(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """(D, N, 2): decay rates as StripedHyena 2's, angles uniform below pi / 10.

    The release does not say how its training began.
    """
    rate, angle = torch.rand(2, *shape[:-1], generator=generator).unbind()
    radius = torch.exp(-math.exp(-1) * (0.01 + 0.09 * rate))
    return torch.view_as_real(torch.polar(radius, angle * math.pi / 10)).clone()
