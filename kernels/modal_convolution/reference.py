"""A causal convolution with a sum of exponentials as a filter, as printed: one loop over tokens. The tests' oracle.

Equations: S4D, arXiv 2206.11893; the modal form of Hyena filters, arXiv 2310.18780 (Laughing Hyena).

Legend: B batch, T tokens, D channels, N modes per channel.
"""

import torch
from torch import Tensor


def modal_convolution_reference(
    u_BTD: Tensor,
    log_poles_DN: Tensor,
    residues_DN: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step by step: x = pole x + u, y = Re sum_n R x + skip u. Returns (y, final state)."""
    poles_DN = torch.exp(log_poles_DN)
    state_BDN = initial_state
    if state_BDN is None:
        state_BDN = poles_DN.new_zeros(u_BTD.shape[0], *poles_DN.shape)
    outputs = []
    for t in range(u_BTD.shape[1]):
        kept_BDN = poles_DN * state_BDN
        if document_starts is not None:
            kept_BDN = torch.where(document_starts[:, t, None, None], 0.0, kept_BDN)
        state_BDN = kept_BDN + u_BTD[:, t, :, None]
        sum_BD = (residues_DN * state_BDN).sum(-1)
        outputs.append(sum_BD.real if sum_BD.is_complex() else sum_BD)
    y_BTD = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u_BTD)
    if skip is not None:
        y_BTD = y_BTD + skip * u_BTD
    return y_BTD, state_BDN
