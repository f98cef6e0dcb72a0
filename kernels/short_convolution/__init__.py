"""Short causal convolution of each channel over its own past, with what precedes the first token passed in.

Origin: the width-4 convolutions of Mamba (arXiv 2312.00752, github.com/Dao-AILab/causal-conv1d) and the width 3 to 128
ones of Hyena and StripedHyena 2. Legend: B batch, T tokens, D channels, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import triton_support
from ..arguments import compute_dtype, expect_shape
from ..documents import checked_starts
from ..long_convolution import long_convolution
from ..long_convolution.toeplitz import WIDEST, ToeplitzConvolution
from .portable import ShortConvolution

__all__ = ["short_convolution"]

_WIDEST_SHIFT_ADD = 15  # for more taps products of matrices are faster (measured on two cores)
_WIDEST_FUSED_SILU = 8  # the Triton backward holds 2 W - 1 tokens in registers


def short_convolution(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias: Tensor | None = None,
    *,
    halo: Tensor | None = None,
    activation: str | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """y_t = bias + sum_{j<W} weight[:, W-1-j] x_{t-j}: the last tap multiplies the current token.

    Args:
        x_BTD: inputs, any floating dtype; y has the same. weight_DW, bias (D,): any width.
        halo: (B, W-1, D) tokens before the first one; zeros by default. Differentiable.
        activation: None or "silu", applied to the sum.
        document_starts: boolean (B or 1, T); no tap reaches back over a True token.

    Half precision is computed in float32, block by block.

    Raises:
        ValueError: if shapes do not agree or the activation is unknown.
    """
    batch, length, channels = x_BTD.shape
    if weight_DW.dim() != 2 or weight_DW.shape[0] != channels or weight_DW.shape[1] < 1:
        raise ValueError(f"short convolution: weight has shape {tuple(weight_DW.shape)}, expected ({channels}, taps)")
    width = weight_DW.shape[1]
    expect_shape("short convolution", "bias", bias, (channels,))
    expect_shape("short convolution", "halo", halo, (batch, width - 1, channels))
    if activation not in (None, "silu"):
        raise ValueError(f"short convolution: activation {activation!r} is unknown; use None or 'silu'")
    if halo is None:
        halo = x_BTD.new_zeros(batch, width - 1, channels)
    starts_BT = checked_starts(document_starts, batch, length)
    dtype = compute_dtype(x_BTD)
    weight_DW = weight_DW.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    halo = halo.to(x_BTD.dtype)
    if width <= _WIDEST_SHIFT_ADD:
        function, silu = ShortConvolution, activation == "silu"
        if triton_support.takes(x_BTD, weight_DW, bias):
            from .triton_convolution import TritonShortConvolution as function

            if silu and width > _WIDEST_FUSED_SILU:
                return F.silu(function.apply(x_BTD, weight_DW, bias, halo, starts_BT, False))
        return function.apply(x_BTD, weight_DW, bias, halo, starts_BT, silu)
    if width <= WIDEST:
        y_BTD = ToeplitzConvolution.apply(x_BTD, weight_DW.flip(1), halo, starts_BT)
    else:
        extended = torch.cat((halo, x_BTD), 1)
        starts_BE = None if starts_BT is None else F.pad(starts_BT, (width - 1, 0))
        y_BTD = long_convolution(extended, weight_DW.flip(1), document_starts=starts_BE)[:, width - 1 :]
    y_BTD = y_BTD if bias is None else (y_BTD + bias).to(x_BTD.dtype)
    return F.silu(y_BTD) if activation == "silu" else y_BTD
