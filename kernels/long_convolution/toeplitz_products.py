"""Products of rows of tokens with a filter's Toeplitz matrices, in PyTorch.

Legend: D channels, W taps, R rows, Q tokens of a row.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Products(Protocol):
    """The three products. Rows are (D, R, Q) of `dtype`; those of x are `spill` more than those of y, in front.

    `depth_R`: int32, how many rows of its document precede each row of y; None where nothing has to be kept apart.
    """

    row: int
    spill: int
    dtype: torch.dtype

    def forward(self, x_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        """The rows of y."""
        ...

    def to_inputs(self, grad_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        """The gradient of the rows of x."""
        ...

    def to_taps(self, x_DRQ: Tensor, grad_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        """The gradient of the taps, (D, W)."""
        ...


class PortableProducts:
    """Batched matrix products; the Toeplitz matrices of all channels exist."""

    def __init__(self, taps_DW: Tensor) -> None:
        channels, taps = taps_DW.shape
        row = 16 if taps <= 64 else 32  # measured: shorter rows make more calls, longer ones waste products
        self.row, self.spill, self.dtype, self.taps = row, -(-(taps - 1) // row), taps_DW.dtype, taps
        padded = F.pad(taps_DW, (row - 1, (self.spill + 1) * row - taps))
        # Row s of T_j begins at lag j Q - s.
        flipped = padded.as_strided((channels, self.spill + 1, row, row), (padded.stride(0), row, 1, 1))
        self.matrices = [matrix.contiguous() for matrix in flipped.flip(2).unbind(1)]

    def forward(self, x_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        y_DRQ = torch.bmm(x_DRQ[:, self.spill :], self.matrices[0])
        for j in range(1, self.spill + 1):
            y_DRQ.baddbmm_(self._spilled(x_DRQ, j, depth_R), self.matrices[j])
        return y_DRQ

    def to_inputs(self, grad_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        rows = grad_DRQ.shape[1] + self.spill
        extended = F.pad(grad_DRQ, (0, 0, self.spill, self.spill))
        grad_x = torch.bmm(extended[:, :rows], self.matrices[0].mT)
        for j in range(1, self.spill + 1):
            readers = extended[:, j : j + rows]
            if depth_R is not None:
                readers = readers * F.pad(depth_R >= j, (self.spill, self.spill))[j : j + rows].unsqueeze(1)
            grad_x.baddbmm_(readers, self.matrices[j].mT)
        return grad_x

    def to_taps(self, x_DRQ: Tensor, grad_DRQ: Tensor, depth_R: Tensor | None) -> Tensor:
        by_lag = grad_DRQ.new_zeros(len(grad_DRQ), (self.spill + 2) * self.row - 1)
        for j in range(self.spill + 1):
            grad_DQQ = torch.bmm(self._spilled(x_DRQ, j, depth_R).mT, grad_DRQ)
            by_lag[:, j * self.row : (j + 2) * self.row - 1] += sums_of_diagonals(grad_DQQ)
        return by_lag[:, self.row - 1 : self.row - 1 + self.taps]

    def _spilled(self, x_DRQ: Tensor, j: int, depth_R: Tensor | None) -> Tensor:
        """The rows j places before those of y, zero where they are of another document."""
        rows = x_DRQ[:, self.spill - j : x_DRQ.shape[1] - j]
        return rows if depth_R is None or j == 0 else rows * (depth_R >= j).unsqueeze(1)


def sums_of_diagonals(x_DQQ: Tensor) -> Tensor:
    """(D, 2 Q - 1): the sums of x[s, t] with t - s = -(Q - 1), ..., Q - 1."""
    channels, row, _ = x_DQQ.shape
    # Rows of 2 Q elements read as rows of 2 Q - 1: each lies one place further to the right than the one above it.
    skewed = F.pad(x_DQQ.flip(1), (0, row)).flatten(1)[:, : row * (2 * row - 1)]
    return skewed.view(channels, row, 2 * row - 1).sum(1)
