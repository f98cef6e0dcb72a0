"""State-space duality (Mamba-2) as printed: one loop over tokens, differentiated by autograd. The oracle of the tests.

Equations: T. Dao and A. Gu, "Transformers are SSMs", arXiv 2405.21060.

Legend: B batch, T tokens, H heads, P head width, G groups of heads, N states.
"""

import torch
from torch import Tensor


def state_space_dual_reference(
    x_BTHP: Tensor,
    log_decay_BTH: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step by step: S = exp(log_decay) S + x B^T, y = S C. Returns (y, final state)."""
    batch, length, heads, width = x_BTHP.shape
    repeats = heads // B_BTGN.shape[2]
    B_BTHN, C_BTHN = B_BTGN.repeat_interleave(repeats, 2), C_BTGN.repeat_interleave(repeats, 2)
    state_BHPN = initial_state
    if state_BHPN is None:
        state_BHPN = x_BTHP.new_zeros(batch, heads, width, B_BTGN.shape[3])
    outputs = []
    for t in range(length):
        decay_BH = torch.exp(log_decay_BTH[:, t])
        if document_starts is not None:
            decay_BH = torch.where(document_starts[:, t, None], 0.0, decay_BH)
        entering_BHPN = x_BTHP[:, t, :, :, None] * B_BTHN[:, t, :, None, :]
        state_BHPN = decay_BH[:, :, None, None] * state_BHPN + entering_BHPN
        outputs.append((state_BHPN * C_BTHN[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x_BTHP), state_BHPN
