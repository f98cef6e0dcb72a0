"""Rows to experts and back: sorting by expert, and the products of the sorted rows with their experts' matrices.

Legend: N tokens, J choices per token, M rows sorted by expert (N J where every choice is here), C = M choices listed by
token, E experts, D width in, F width out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import triton_support
from .portable import GatherRows, GroupedMatmul, SumRows

__all__ = ["RowMap", "check_experts", "count_choices", "gather_rows", "grouped_matmul", "permute", "sum_rows"]


@dataclass(frozen=True)
class RowMap:
    """Which token each of M rows belongs to, and the inverse: the rows of each token. All int64.

    Attributes:
        token_M: the token of each row.
        choice_M: the place of each row in the list by token.
        row_C: that list: the rows of token 0, those of token 1, ...
        token_C: the token of each entry of the list, ascending.
        start_N: N + 1 numbers: where each token's entries begin, and C.
    """

    token_M: Tensor
    choice_M: Tensor
    row_C: Tensor
    token_C: Tensor
    start_N: Tensor

    @classmethod
    def of(cls, choice_M: Tensor, token_C: Tensor, num_tokens: int) -> RowMap:
        """From the place of each row in the list by token, and the token (ascending) of each place."""
        each_M = torch.arange(len(choice_M), device=choice_M.device)
        row_C = torch.empty_like(choice_M).scatter_(0, choice_M, each_M)  # a permutation's inverse, without sorting
        start_N = torch.zeros(num_tokens + 1, dtype=torch.int64, device=choice_M.device)
        start_N.scatter_add_(0, token_C + 1, torch.ones_like(token_C))
        return cls(token_C.index_select(0, choice_M), choice_M, row_C, token_C, start_N.cumsum(0))

    @classmethod
    def of_sorted(cls, order_M: Tensor, choices: int) -> RowMap:
        """From the first result of `permute` where every token has as many choices."""
        each_M = torch.arange(len(order_M), device=order_M.device)
        row_C = torch.empty_like(order_M).scatter_(0, order_M, each_M)
        start_N = torch.arange(0, len(order_M) + 1, choices, device=order_M.device)
        return cls(order_M // choices, order_M, row_C, each_M // choices, start_N)

    @property
    def num_rows(self) -> int:
        return len(self.token_M)

    @property
    def num_tokens(self) -> int:
        return len(self.start_N) - 1


def gather_rows(x_ND: Tensor, rows: RowMap) -> Tensor:
    """Every row's token: (M, D). The gradient of a token is the sum of its rows', in the order of its list.

    Raises:
        ValueError: if the map is not for N tokens.
    """
    if len(x_ND) != rows.num_tokens:
        raise ValueError(f"gather_rows: {len(x_ND)} tokens, but the map is for {rows.num_tokens}")
    function = GatherRows
    if triton_support.takes(x_ND) and rows.num_rows:
        from .triton_permutation import TritonGatherRows as function
    return function.apply(x_ND, rows.token_M, rows.row_C, rows.start_N)


def sum_rows(rows_MD: Tensor, rows: RowMap, weight_C: Tensor | None = None, onto_ND: Tensor | None = None) -> Tensor:
    """The sum over each token's rows, times their weights, and what it is added onto: (N, D), zero where nothing is.

    Args:
        weight_C: one for each entry of the list by token, of the rows' dtype; by default 1.
        onto_ND: of the rows' dtype.

    Rows of half types are summed in float32. The inverse map says which are a token's: no sum is shared.

    Raises:
        ValueError: if shapes or dtypes do not agree.
    """
    if len(rows_MD) != rows.num_rows:
        raise ValueError(f"sum_rows: {len(rows_MD)} rows, but the map is for {rows.num_rows}")
    for name, given, shape in (
        ("weights", weight_C, rows.row_C.shape),
        ("sum to add onto", onto_ND, (rows.num_tokens, rows_MD.shape[1])),
    ):
        if given is not None and (given.shape != shape or given.dtype != rows_MD.dtype):
            raise ValueError(
                f"sum_rows: {name} {tuple(given.shape)} {given.dtype}; expected {tuple(shape)} {rows_MD.dtype}"
            )
    function = SumRows
    if triton_support.takes(rows_MD, weight_C, onto_ND):
        from .triton_permutation import TritonSumRows as function
    return function.apply(
        rows_MD, weight_C, onto_ND, rows.token_M, rows.choice_M, rows.row_C, rows.token_C, rows.start_N
    )


def permute(expert_index_NJ: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort choices by expert, stably. Returns (order_M, counts_E), both int64.

    Args:
        expert_index_NJ: (N, J), the experts each token chose, of any integer dtype (short ones sort faster on a CPU).

    Row m of the sorted array is choice `order[m] % J` of token `order[m] // J`; expert e has the `counts[e]` rows after
    those of the experts before it. `y[order] = sorted_rows` undoes the sorting.

    Raises:
        ValueError: on the CPU, if an index is outside 0 .. num_experts - 1.
    """
    check_experts("permute", expert_index_NJ, num_experts)
    flat_M = expert_index_NJ.flatten()
    return torch.argsort(flat_M, stable=True), count_choices(flat_M, num_experts)


def check_experts(operation: str, expert_index: Tensor, num_experts: int) -> None:
    """Raise ValueError, on the CPU, if an index is outside 0 .. num_experts - 1."""
    if expert_index.device.type == "cpu" and expert_index.numel():  # an accelerator would have to be waited for
        low, high = (int(bound) for bound in expert_index.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"{operation}: expert {low if low < 0 else high} is outside 0 .. {num_experts - 1}")


def count_choices(expert_index: Tensor, num_experts: int) -> Tensor:
    """How many of these indices, of any integer dtype and shape, name each expert: (E,) int64."""
    flat_M = expert_index.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_M.device)
    # torch.bincount would make the process wait for an accelerator
    return counts_E.scatter_add_(0, flat_M.long(), torch.ones_like(flat_M, dtype=torch.int64))


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
