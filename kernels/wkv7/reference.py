"""The recurrence of RWKV-7 as printed: one loop over tokens, differentiated by autograd. The oracle of the tests.

Equations: B. Peng and others, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456.

Legend: B batch, T tokens, H heads, N head width (keys and values have the same).
"""

import torch
from torch import Tensor


def wkv7_reference(
    r_BTHN: Tensor,
    log_w_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHN: Tensor,
    a_BTHN: Tensor,
    b_BTHN: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step by step: S = S (diag(w) + a b^T) + v k^T, y = S r. Returns (y, final state)."""
    batch, length, heads, width = r_BTHN.shape
    state_BHNN = initial_state
    if state_BHNN is None:
        state_BHNN = r_BTHN.new_zeros(batch, heads, width, width)
    outputs = []
    for t in range(length):
        r, log_w, k, v, a, b = (x[:, t] for x in (r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN))
        if document_starts is not None:
            state_BHNN = torch.where(document_starts[:, t, None, None, None], 0.0, state_BHNN)
        removed_BHN = (state_BHNN @ a.unsqueeze(-1)).squeeze(-1)
        state_BHNN = state_BHNN * torch.exp(log_w).unsqueeze(-2)
        state_BHNN = state_BHNN + removed_BHN.unsqueeze(-1) * b.unsqueeze(-2) + v.unsqueeze(-1) * k.unsqueeze(-2)
        outputs.append((state_BHNN @ r.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(r_BTHN), state_BHNN
