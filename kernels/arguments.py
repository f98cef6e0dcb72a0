"""What the doors do with arguments: in which dtype to compute, and shapes that must agree."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Of sums, states and decays: float32, or float64 as soon as one argument is (complex128 counts as such)."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(x is not None and x.dtype in wide for x in tensors) else torch.float32


def expect_shape(operation: str, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor is absent or has this shape."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{operation}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
