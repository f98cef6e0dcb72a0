"""HiPPO-LegS, the matrix by which a state remembers its input as Legendre coefficients, and its normal form.

A_nk = -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k, 0 above (Gu et al., arXiv 2008.07669). It cannot be
diagonalised stably, but A + P P' with P_n = sqrt(n + 1/2) is -1/2 plus a skew matrix, hence normal, hence unitarily
diagonal (S4, arXiv 2111.00396; S4D keeps the diagonal alone, arXiv 2206.11893).

Shapes: N state, M = N / 2 one of each pair of conjugate modes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def hippo_legs(state: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,), float64."""
    n = torch.arange(state, dtype=torch.float64, device="cpu")
    B_N = torch.sqrt(2 * n + 1)
    return -torch.tril(B_N[:, None] * B_N, diagonal=-1) - torch.diag(n + 1), B_N


def low_rank_part(state: int) -> Tensor:
    """P (N,), float64: A + P P' is normal."""
    return torch.sqrt(torch.arange(state, dtype=torch.float64, device="cpu") + 0.5)


@lru_cache
def legs_modes(state: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lambda, P and B (M,), complex128: HiPPO-LegS as Lambda - P P* in the basis that makes its normal part diagonal.

    Of each conjugate pair the mode of positive frequency, by ascending frequency. The phases of the basis are such
    that P is real and positive.
    """
    A_NN, B_N = hippo_legs(state)
    P_N = low_rank_part(state)
    normal_NN = A_NN + torch.outer(P_N, P_N)
    real = normal_NN.diagonal().mean()
    skew_NN = normal_NN - torch.diag(real.expand(state))
    frequencies_N, basis_NN = torch.linalg.eigh(-1j * skew_NN)
    basis_NM = basis_NN[:, state // 2 :]
    P_M = basis_NM.mH @ P_N.to(basis_NM.dtype)
    basis_NM = basis_NM * (P_M / P_M.abs())
    P_M, B_M = (basis_NM.mH @ vector.to(basis_NM.dtype) for vector in (P_N, B_N))
    return torch.complex(real.expand(state // 2), frequencies_N[state // 2 :]), P_M, B_M
