"""Cross-entropy of a linear layer's outputs with all logits in memory. The oracle of the tests.

Legend: N tokens, D width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T + bias)[target]."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias)
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")
