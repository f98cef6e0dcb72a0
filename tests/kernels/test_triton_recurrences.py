"""The Triton kernels of RWKV-4 and RWKV-7 against their step loops in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.wkv4 import EMPTY, wkv4, wkv4_state
from longstride.kernels.wkv4.reference import wkv4_reference
from longstride.kernels.wkv7 import wkv7
from longstride.kernels.wkv7.reference import wkv7_reference

from .compare import start_mask
from .native import BFLOAT16_BOUND, DEVICE, FLOAT32_BOUND, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_wkv4 import arguments as arguments4
from .test_wkv4 import full as full4
from .test_wkv7 import arguments as arguments7
from .test_wkv7 import full as full7
from .test_wkv7 import staged as staged7
from .test_wkv7 import staged_reference as staged_reference7

pytestmark = needs_triton


@pytest.mark.parametrize("keys", [2.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 11, 3), (1, 8, 20), *([(2, 1000, 100)] if NATIVE else [])])
def test_wkv4_equals_the_step_loop(shape: tuple[int, int, int], keys: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of any size: numerator and denominator share an exponent, which single precision rounds at every token.

    Over a thousand tokens the step loop in single precision is off by more than FLOAT32_BOUND itself.
    """
    fast, slow, inputs = partial(full4, wkv4), partial(full4, wkv4_reference), arguments4(*shape, keys=keys)
    with triton_chosen(monkeypatch) as launched:
        found = errors(fast, slow, inputs, torch.float32)
    loop = errors(slow, slow, inputs, torch.float32)
    assert all(error < max(FLOAT32_BOUND, 3 * alike) for error, alike in zip(found, loop, strict=True)), (found, loop)
    assert launched == ["wkv4_kernel", "wkv4_gradient_kernel"]


@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (3, 4, 5)), (1, (1, 8, 10))])
def test_wkv4_documents(rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(rows, 11, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments4(2, 11, 3)
    slow = partial(full4, wkv4_reference, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(full4, wkv4, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(partial(full4, wkv4), slow, inputs, torch.float32)) > 1e-3  # negative control


@pytest.mark.parametrize("shape", [(1, 9, 3), *([(2, 1000, 100)] if NATIVE else [])])
def test_wkv4_in_bfloat16(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, states and all gradients; then outputs from nothing."""
    with triton_chosen(monkeypatch):
        assert_close(partial(full4, wkv4), partial(full4, wkv4_reference), arguments4(*shape), torch.bfloat16)
        assert_close(lambda *x: wkv4(*x)[0], lambda *x: wkv4_reference(*x)[0], arguments4(*shape)[:4], torch.bfloat16)
    assert EMPTY[2] > torch.finfo(torch.float32).min


def last_state(k: Tensor, v: Tensor, log_decay: Tensor, **options) -> Tensor:
    return wkv4_reference(k, v, log_decay, torch.zeros_like(log_decay), **options)[1]


@pytest.mark.parametrize(("keys", "dtype"), [(2.0, torch.float32), (30.0, torch.float32), (2.0, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 11, 3), (1, 33, 20), *([(2, 3000, 100)] if NATIVE else [])])
def test_wkv4_state_is_the_last_of_the_step_loop(
    shape: tuple[int, int, int], keys: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exponent too, and the gradient of the key that set it; no worse than the step loop in the same precision."""
    inputs = arguments4(*shape, keys=keys)[:3]
    with triton_chosen(monkeypatch) as launched:
        found = errors(wkv4_state, last_state, inputs, dtype)
    loop = errors(last_state, last_state, inputs, dtype)
    bound = FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND
    assert all(error < max(bound, 3 * alike) for error, alike in zip(found, loop, strict=True)), (found, loop)
    assert launched == ["wkv4_state_kernel", "wkv4_state_gradient_kernel"]


@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (3, 4, 5)), (1, (1, 8, 18)), (2, (7, 20))])
def test_wkv4_state_of_the_last_document(
    rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole segments lie before it."""
    starts = start_mask(rows, 21, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs, slow = arguments4(2, 21, 3)[:3], partial(last_state, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(wkv4_state, document_starts=starts.to(DEVICE)), slow, inputs)
        assert positions == (0,) or max(errors(wkv4_state, slow, inputs, torch.float32)) > 1e-3  # negative control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 2, 3), (1, 9, 1, 18), *([(1, 500, 3, 64)] if NATIVE else [])])
def test_wkv7_equals_the_step_loop(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(full7, wkv7), partial(full7, wkv7_reference), arguments7(*shape), dtype)
    assert launched == ["wkv7_kernel", "wkv7_gradient_kernel"]


@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (3, 4, 5)), (1, (1, 8, 10))])
def test_wkv7_documents(rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(rows, 11, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments7(2, 11, 1, 3)
    slow = partial(full7, wkv7_reference, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(full7, wkv7, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(partial(full7, wkv7), slow, inputs, torch.float32)) > 1e-3  # negative control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 70, 2, 3), *([(1, 1100, 3, 64)] if NATIVE else [])])
def test_wkv7_in_stages_is_pytorch_on_every_device(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = start_mask(1, shape[1], (0, 40))
    fast = partial(staged7, document_starts=starts.to(DEVICE))
    slow = partial(staged_reference7, document_starts=starts)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, arguments7(*shape), dtype)
    assert not launched
