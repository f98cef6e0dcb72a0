"""Document starts as kernels take them: a boolean mask (batch or 1, length), True at a document's first token."""

from itertools import pairwise

import torch
from torch import Tensor


def checked_starts(document_starts: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The mask, after checking that it is boolean and of shape (batch or 1, length). Raises ValueError otherwise."""
    if document_starts is None:
        return None
    if not isinstance(document_starts, Tensor) or document_starts.dtype != torch.bool:
        given = getattr(document_starts, "dtype", type(document_starts).__name__)
        raise ValueError(f"document_starts must be a boolean mask ({batch} or 1, {length}), not {given}")
    if document_starts.dim() != 2 or document_starts.shape[0] not in (1, batch) or document_starts.shape[1] != length:
        raise ValueError(
            f"document_starts has shape {tuple(document_starts.shape)}; expected ({batch} or 1, {length}): "
            "one row for the batch or one for each of its sequences"
        )
    return document_starts


def first_start(document_starts: Tensor) -> Tensor:
    """(B or 1,) int64: position of the first True of each row; the length where there is none."""
    length = document_starts.shape[1]
    positions = torch.arange(length, device=document_starts.device)
    return torch.where(document_starts, positions, length).amin(1) if length else document_starts.sum(1)


def document_age(document_starts: Tensor) -> Tensor:
    """(B or 1, T) int64: tokens since the latest document start; 2^40 or more before the first start of a row."""
    positions = torch.arange(document_starts.shape[1], device=document_starts.device)
    latest = torch.where(document_starts, positions, -(1 << 40)).cummax(1).values
    return positions - latest


def document_ranges(document_starts: Tensor | None, length: int) -> list[list[tuple[int, int]]]:
    """Per row of the mask, the half-open ranges between document starts; one row [(0, length)] without a mask."""
    if document_starts is None:
        return [[(0, length)]]
    rows = []
    for row in document_starts.cpu():
        cuts = sorted({0, length, *row.nonzero().flatten().tolist()})
        rows.append(list(pairwise(cuts)))
    return rows
