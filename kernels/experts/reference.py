"""Sorting by expert and one matrix product per expert, in the plainest form. The oracle of the tests.

Legend: N tokens, J choices per token, M = N J rows, E experts, D width in, F width out.
"""

import torch
from torch import Tensor


def permute_reference(expert_index_NJ: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rows of the flattened choices by expert, in their order within each; and how many each expert has."""
    flat = expert_index_NJ.flatten().tolist()
    order = [row for expert in range(num_experts) for row, chosen in enumerate(flat) if chosen == expert]
    counts = [flat.count(expert) for expert in range(num_experts)]
    device = expert_index_NJ.device
    return torch.tensor(order, dtype=torch.int64, device=device), torch.tensor(counts, dtype=torch.int64, device=device)


def grouped_matmul_reference(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of expert e times its matrix."""
    pieces = x_MD.split(counts_E.tolist())
    return torch.cat([piece @ weight_DF for piece, weight_DF in zip(pieces, weight_EDF, strict=True)])
