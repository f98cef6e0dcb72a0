"""Outputs and all gradients of a fast operation beside those of its reference, in float64."""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

# float64 operations differ by summation order only; the largest error seen is two orders smaller.
TOLERANCE = 1e-12


def compiler_is_here() -> bool:
    """What a build of the compiled kernels needs; where it is, a build that fails is a failure."""
    return shutil.which(cpp_extension.get_cxx_compiler()) is not None and cpp_extension.is_ninja_available()


def leaf(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A fresh random tensor that requires a gradient."""
    generator = torch.Generator().manual_seed(seed * 1000003 + sum((i + 1) * n for i, n in enumerate(shape)))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def start_mask(rows: int, length: int, *starts: tuple[int, int]) -> Tensor:
    """A boolean mask (rows, length), True at the given (row, position) pairs."""
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, position in starts:
        mask[row, position] = True
    return mask


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected magnitude."""
    assert value.shape == expected.shape, (value.shape, expected.shape)
    if not value.numel():
        return 0.0
    scale = expected.detach().abs().max().clamp_min(1e-30)
    return float(((value.detach().to(expected.dtype) - expected.detach()).abs().max() / scale).item())


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], weights_seed: int = 7
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a random weighting of all of them."""
    result = function(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
    for index, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(weights_seed + index)
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)  # the same on every device
        total = total + (output.double() * weights.to(output.device)).sum()
    gradients = torch.autograd.grad(total, list(inputs), allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return outputs, zeros


def worst_error(fast: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor]) -> float:
    """The largest relative error over all outputs and the gradients of all inputs."""
    fast_outputs, fast_gradients = outputs_and_gradients(fast, inputs)
    outputs, gradients = outputs_and_gradients(reference, inputs)
    pairs = zip(fast_outputs + fast_gradients, outputs + gradients, strict=True)
    errors = [relative_error(value, expected) for value, expected in pairs]
    assert all(torch.isfinite(gradient).all() for gradient in fast_gradients)
    return max(errors)


def assert_same(fast: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Fail unless every output and every gradient agrees to float64 rounding."""
    error = worst_error(fast, reference, inputs)
    assert error < TOLERANCE, f"relative error {error:.2e}"
