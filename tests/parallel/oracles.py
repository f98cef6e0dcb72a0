"""Shared pieces of the exactness tests: deterministic inputs, slices of them, relative errors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from longstride.parallel import SequenceShard


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values that every process draws alike."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def local(x: Tensor, shard: SequenceShard, dim: int = 1) -> Tensor:
    """This shard's slice of a global tensor, as a leaf that collects gradients."""
    return x.narrow(dim, shard.start, shard.local_length).clone().requires_grad_()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected magnitude."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    scale = expected.abs().max().clamp(min=1e-30)
    return float((actual - expected).abs().max() / scale)


def gathered(parts: Iterable[Tensor], dim: int = 1) -> Tensor:
    return torch.cat(list(parts), dim=dim)
