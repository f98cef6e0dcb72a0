"""Gated linear attention as printed: one loop over tokens, differentiated by autograd. The oracle of the tests.

Equations: S. Yang and others, "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv 2312.06635.

Legend: B batch, T tokens, H heads, K key width, V value width.
"""

import torch
from torch import Tensor


def gated_linear_attention_reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_BTHK: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step by step: S = diag(exp(log_decay)) S + k v^T, y = S^T q. Returns (y, final state)."""
    batch, length, heads, key_width = k_BTHK.shape
    state_BHKV = initial_state
    if state_BHKV is None:
        state_BHKV = k_BTHK.new_zeros(batch, heads, key_width, v_BTHV.shape[3])
    outputs = []
    for t in range(length):
        decay_BHK = torch.exp(log_decay_BTHK[:, t])
        if document_starts is not None:
            decay_BHK = torch.where(document_starts[:, t, None, None], 0.0, decay_BHK)
        entering_BHKV = k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        state_BHKV = decay_BHK.unsqueeze(-1) * state_BHKV + entering_BHKV
        outputs.append((state_BHKV * q_BTHK[:, t].unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v_BTHV), state_BHKV


def gated_linear_attention_readout_reference(
    state_BHKV: Tensor, q_BTHK: Tensor, log_decay_BTHK: Tensor, *, document_starts: Tensor | None = None
) -> Tensor:
    """What `state_BHKV` adds to the outputs of the tokens after it: the recurrence with no input."""
    nothing_BTHV = torch.zeros_like(q_BTHK[..., :1]).expand(-1, -1, -1, state_BHKV.shape[3])
    return gated_linear_attention_reference(
        q_BTHK, torch.zeros_like(q_BTHK), nothing_BTHV, log_decay_BTHK,
        initial_state=state_BHKV, document_starts=document_starts,
    )[0]  # fmt: skip
