"""Rows to experts and back: sorting by expert, and the products of the sorted rows with their experts' matrices.

Legend: N tokens, J choices per token, M = N J rows, E experts, D width in, F width out.
"""

import torch
from torch import Tensor

from .portable import GroupedMatmul

__all__ = ["grouped_matmul", "permute"]


def permute(expert_index_NJ: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort choices by expert, stably. Returns (order_M, counts_E), both int64.

    Args:
        expert_index_NJ: (N, J) int64, the experts each token chose.

    Row m of the sorted array is choice `order[m] % J` of token `order[m] // J`; expert e has the `counts[e]` rows after
    those of the experts before it. `y[order] = sorted_rows` undoes the sorting.

    Raises:
        ValueError: on the CPU, if an index is outside 0 .. num_experts - 1.
    """
    flat_M = expert_index_NJ.flatten()
    if flat_M.device.type == "cpu" and flat_M.numel():  # on an accelerator the check would wait for it
        low, high = (int(bound) for bound in flat_M.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"permute: expert {low if low < 0 else high} is outside 0 .. {num_experts - 1}")
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_M.device)
    counts_E.scatter_add_(0, flat_M, torch.ones_like(flat_M))
    return torch.argsort(flat_M, stable=True), counts_E


def grouped_matmul(x_MD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply the rows of each expert by its matrix: y_MF.

    Args:
        x_MD: rows sorted by expert. weight_EDF: one matrix per expert. counts_E: int64 rows of each; may be zero; their
            sum must be M.

    Any floating dtype, the same for both; float32 and bfloat16 take PyTorch's grouped product where sizes allow it.

    Raises:
        ValueError: if shapes do not agree or, on the CPU, if the counts do not add up to M.
    """
    if x_MD.dim() != 2 or weight_EDF.dim() != 3 or x_MD.shape[1] != weight_EDF.shape[1]:
        raise ValueError(
            f"grouped_matmul: rows {tuple(x_MD.shape)} do not fit matrices {tuple(weight_EDF.shape)}; "
            "expected (M, D) and (E, D, F)"
        )
    if tuple(counts_E.shape) != weight_EDF.shape[:1]:
        raise ValueError(f"grouped_matmul: {counts_E.numel()} counts for {weight_EDF.shape[0]} matrices")
    if counts_E.device.type == "cpu" and int(counts_E.sum()) != x_MD.shape[0]:
        raise ValueError(f"grouped_matmul: counts add up to {int(counts_E.sum())}, but there are {x_MD.shape[0]} rows")
    return GroupedMatmul.apply(x_MD, weight_EDF, counts_E)
