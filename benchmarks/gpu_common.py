"""What the modules of cases for a GPU share: the device, random tensors on it, peers, the plain FFT convolution."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

DTYPE = torch.bfloat16
DEVICE = "cuda"


def peer(module: str, name: str) -> Any:
    """A peer's function. ImportError, which becomes a row of the table, where it is not installed."""
    return getattr(importlib.import_module(module), name)


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Normal, with a gradient."""
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()


def convolve_by_fft(u: Tensor, taps: Tensor) -> Tensor:
    """Causal convolution of (B, T, D) with (D, T) as one writes it down."""
    size = 2 * u.shape[1]
    spectrum = torch.fft.rfft(u.float().transpose(1, 2), size) * torch.fft.rfft(taps, size)
    return torch.fft.irfft(spectrum, size)[..., : u.shape[1]].transpose(1, 2).to(u.dtype)
