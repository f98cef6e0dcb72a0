"""Short causal convolution of each channel, one token and one tap at a time. The oracle of the tests.

Legend: B batch, T tokens, D channels, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution_reference(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias: Tensor | None = None,
    *,
    halo: Tensor | None = None,
    activation: str | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """y_t = bias + sum_j weight[W-1-j] x_{t-j}, over the taps j that stay in the token's document."""
    batch, length, channels = x_BTD.shape
    width = weight_DW.shape[1]
    if halo is None:
        halo = x_BTD.new_zeros(batch, width - 1, channels)
    extended = torch.cat((halo, x_BTD), 1)
    rows = []
    for b in range(batch):
        for t in range(length):
            total = x_BTD.new_zeros(channels) if bias is None else bias
            for j in range(width):
                total = total + weight_DW[:, width - 1 - j] * extended[b, t + width - 1 - j]
                starts = document_starts
                if starts is not None and t >= j and starts[b if starts.shape[0] > 1 else 0, t - j]:
                    break
            rows.append(total)
    y_BTD = torch.stack(rows).view(batch, length, channels) if rows else torch.zeros_like(x_BTD)
    return F.silu(y_BTD) if activation == "silu" else y_BTD
