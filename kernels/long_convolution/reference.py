"""Long causal convolution as a sum over lags. The oracle of the tests; quadratic in the length.

Legend: B batch, L length, D channels, K taps of the filter.
"""

import torch
from torch import Tensor


def long_convolution_reference(
    u_BLD: Tensor,
    filter_DK: Tensor,
    *,
    skip: Tensor | None = None,
    input_gate: Tensor | None = None,
    gate: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Tensor:
    """gate_t (skip v_t + sum_k filter[k] v_{t-k}), v = input_gate u, over the lags k that stay in the document."""
    u_BLD = u_BLD if input_gate is None else u_BLD * input_gate
    batch, length, channels = u_BLD.shape
    document_BL = torch.zeros(1, length, dtype=torch.int64, device=u_BLD.device)
    if document_starts is not None:
        document_BL = document_starts.cumsum(1)
    y_BLD = torch.zeros_like(u_BLD) if skip is None else skip * u_BLD
    for lag in range(min(length, filter_DK.shape[1])):
        same_BL1 = (document_BL[:, lag:] == document_BL[:, : length - lag]).unsqueeze(2)
        term = torch.where(same_BL1, filter_DK[:, lag] * u_BLD[:, : length - lag], 0.0)
        y_BLD = y_BLD + torch.cat((u_BLD.new_zeros(batch, lag, channels), term), 1)
    return y_BLD if gate is None else y_BLD * gate
