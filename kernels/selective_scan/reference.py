"""The selective scan as printed: one loop over tokens, any dtype, differentiated by autograd. The oracle of the tests.

Equations: A. Gu and T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752.

Legend: B batch, T tokens, D channels, N states per channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u_BTD: Tensor,
    delta_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    *,
    D: Tensor | None = None,
    z_BTD: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step by step: h = exp(delta A) h + delta u B; y = C h + D u, gated by silu(z). Returns (y, final state)."""
    batch, length, channels = u_BTD.shape
    step_BTD = delta_BTD if delta_bias is None else delta_BTD + delta_bias
    if delta_softplus:
        step_BTD = F.softplus(step_BTD)
    state_BDN = initial_state
    if state_BDN is None:
        state_BDN = u_BTD.new_zeros(batch, channels, A_DN.shape[1])
    outputs = []
    for t in range(length):
        decay_BDN = torch.exp(step_BTD[:, t, :, None] * A_DN)
        if document_starts is not None:
            decay_BDN = torch.where(document_starts[:, t, None, None], 0.0, decay_BDN)
        entering_BDN = (step_BTD[:, t] * u_BTD[:, t])[:, :, None] * B_BTN[:, t, None, :]
        state_BDN = decay_BDN * state_BDN + entering_BDN
        outputs.append((state_BDN * C_BTN[:, t, None, :]).sum(-1))
    y_BTD = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u_BTD)
    if D is not None:
        y_BTD = y_BTD + D * u_BTD
    if z_BTD is not None:
        y_BTD = y_BTD * F.silu(z_BTD)
    return y_BTD, state_BDN
