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


def gather_rows_reference(x_ND: Tensor, token_M: Tensor) -> Tensor:
    """Row m is that of token `token[m]`."""
    return torch.stack([x_ND[token] for token in token_M.tolist()]) if len(token_M) else x_ND[:0]


def sum_rows_reference(
    rows_MD: Tensor, token_M: Tensor, num_tokens: int, weight_M: Tensor | None = None, onto_ND: Tensor | None = None
) -> Tensor:
    """Every row, times its weight, is added to its token."""
    y_ND = [rows_MD.new_zeros(rows_MD.shape[1]) if onto_ND is None else onto_ND[n] for n in range(num_tokens)]
    for row, token in enumerate(token_M.tolist()):
        y_ND[token] = y_ND[token] + rows_MD[row] * (1 if weight_M is None else weight_M[row])
    return torch.stack(y_ND)
