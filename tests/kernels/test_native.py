"""What the comparisons of Triton kernels rest on: tensors stay on the inputs' device, unwritten memory is noticed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from longstride.kernels import selective_scan, swiglu, triton_support
from longstride.kernels.swiglu.reference import swiglu_reference

from .compare import leaf, outputs_and_gradients
from .native import assert_close, needs_triton, triton_chosen
from .test_selective_scan import arguments, full


@contextmanager
def kernels_do_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_chosen(monkeypatch, deterministic=False), monkeypatch.context() as patch:
        patch.setattr(triton_support, "launch", lambda *args, **options: None)
        yield


def test_gradients_are_taken_where_the_inputs_are() -> None:
    """The meta device refuses what another accelerator would: operands on different devices."""
    inputs = [torch.empty(2, 3, device="meta", requires_grad=True), torch.empty(3, device="meta", requires_grad=True)]
    outputs, gradients = outputs_and_gradients(lambda x, y: (x * y, x.sum(0)), inputs)
    assert [x.device.type for x in outputs + gradients] == ["meta"] * 4


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
def test_fresh_memory_is_not_a_number(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with triton_chosen(monkeypatch, deterministic=deterministic):
        fresh = [torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(2, dtype=torch.complex64)]
        assert all(x.isnan().all() for x in fresh)
        assert torch.empty(2, dtype=torch.int32).shape == (2,)
    assert "new_empty" not in Tensor.__dict__


@needs_triton
def test_what_no_kernel_writes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernels_do_nothing(monkeypatch), pytest.raises(AssertionError, match="not written"):
        assert_close(swiglu, swiglu_reference, [leaf(2, 3), leaf(2, 3, seed=1)])


@needs_triton
def test_every_result_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only y; what kernels add to, the gradients of B and C, begins at zero."""
    inputs = [x.detach().float().requires_grad_() for x in arguments(1, 9, 3, 2)]
    with kernels_do_nothing(monkeypatch):
        outputs, gradients = outputs_and_gradients(lambda *x: full(selective_scan, *x), inputs)
    assert all(x.isnan().all() for x in outputs)
    assert [index for index, x in enumerate(gradients) if not x.isnan().all()] == [3, 4]
