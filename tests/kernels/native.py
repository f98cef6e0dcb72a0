"""Public doors made to use their Triton kernels, compared with float64 references.

Where there is a GPU everything runs on it natively; otherwise in Triton's interpreter on the CPU. Memory that a kernel
should write is filled with NaN before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from longstride.kernels import triton_support

from .compare import outputs_and_gradients, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = DEVICE.type == "cuda"
FLOAT32_BOUND = 2e-5
BFLOAT16_BOUND = 3e-2

needs_triton = pytest.mark.skipif(not triton_support.installed(), reason="triton is not installed")
on_gpu = pytest.mark.skipif(not NATIVE, reason="needs a CUDA device")


def filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In place of a function that returns fresh memory."""

    def poisoned(*args: Any, **options: Any) -> Tensor:
        fresh = allocate(*args, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() or fresh.is_complex() else fresh

    return poisoned


@contextmanager
def triton_chosen(monkeypatch: pytest.MonkeyPatch, *, deterministic: bool = True) -> Iterator[list[str]]:
    """Public doors choose Triton whatever the device; fresh memory is NaN. Yields the names of kernels launched.

    Not `deterministic`: kernels may add to shared sums in any order.
    """
    launched: list[str] = []
    launch = triton_support.launch

    def recording(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **options)

    before = torch.are_deterministic_algorithms_enabled()
    with monkeypatch.context() as patch:
        patch.setattr(triton_support, "takes", lambda *tensors: all(x is None or x.numel() for x in tensors))
        patch.setattr(triton_support, "launch", recording)
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, filled_with_nan(getattr(owner, name)))
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            yield launched
        finally:
            torch.use_deterministic_algorithms(before)


def errors(
    fast: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[float]:
    """Relative errors of outputs and all gradients on inputs rounded to `dtype`; the reference gets them in float64."""
    rounded = [x.detach().to(DEVICE, dtype.to_complex() if x.is_complex() else dtype) for x in inputs]
    fresh = [x.clone().requires_grad_() for x in rounded]
    exact = [x.to("cpu", torch.complex128 if x.is_complex() else torch.float64).requires_grad_() for x in rounded]
    outputs, gradients = outputs_and_gradients(fast, fresh)
    expected, expected_gradients = outputs_and_gradients(reference, exact)
    pairs = list(zip(outputs + gradients, expected + expected_gradients, strict=True))
    assert all(torch.isfinite(value).all() for value, _ in pairs), "an element was not written"
    return [relative_error(value.cpu(), want) for value, want in pairs]


def assert_close(
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fail unless every output and every gradient is within rounding of `dtype`."""
    worst = errors(fast, reference, inputs, dtype)
    bound = FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND
    assert max(worst) < bound, f"relative errors {[f'{error:.1e}' for error in worst]}"
