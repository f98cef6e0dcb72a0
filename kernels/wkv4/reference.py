"""The recurrence of RWKV-4 as printed: one loop over tokens, differentiated by autograd. The oracle of the tests.

Equations: B. Peng and others, "RWKV: Reinventing RNNs for the Transformer Era", arXiv 2305.13048, in the stable form of
its released code.

Legend: B batch, T tokens, D channels. A state is (a, b, p): numerator a e^p and denominator b e^p.
"""

import torch
from torch import Tensor

EMPTY = (0.0, 0.0, -1e38)


def wkv4_reference(
    k_BTD: Tensor,
    v_BTD: Tensor,
    log_decay_D: Tensor,
    bonus_D: Tensor,
    *,
    initial_state: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Step by step: y = (past + e^(bonus + k) v) / (the same without v); then past = e^log_decay past + e^k v."""
    batch, _, channels = k_BTD.shape
    state_BD3 = initial_state
    if state_BD3 is None:
        state_BD3 = k_BTD.new_tensor(EMPTY).expand(batch, channels, 3)
    outputs = []
    for k_BD, v_BD, start_B in zip(k_BTD.unbind(1), v_BTD.unbind(1), _columns(document_starts, k_BTD), strict=True):
        state_BD3 = torch.where(start_B[:, None, None], k_BTD.new_tensor(EMPTY), state_BD3)
        a, b, p = state_BD3.unbind(-1)
        q = torch.maximum(p, bonus_D + k_BD)
        past, now = torch.exp(p - q), torch.exp(bonus_D + k_BD - q)
        outputs.append((past * a + now * v_BD) / (past * b + now))
        p_next = torch.maximum(p + log_decay_D, k_BD)
        past, now = torch.exp(p + log_decay_D - p_next), torch.exp(k_BD - p_next)
        state_BD3 = torch.stack((past * a + now * v_BD, past * b + now, p_next), -1)
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v_BTD), state_BD3


def _columns(document_starts: Tensor | None, k_BTD: Tensor) -> tuple[Tensor, ...]:
    if document_starts is None:
        document_starts = torch.zeros(1, k_BTD.shape[1], dtype=torch.bool, device=k_BTD.device)
    return document_starts.unbind(1)
