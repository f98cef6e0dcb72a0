"""The Triton kernels of RWKV-4 and RWKV-7 against their step loops in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch

from longstride.kernels.wkv4 import EMPTY, wkv4
from longstride.kernels.wkv4.reference import wkv4_reference
from longstride.kernels.wkv7 import wkv7
from longstride.kernels.wkv7.reference import wkv7_reference

from .compare import relative_error, start_mask
from .native import DEVICE, FLOAT32_BOUND, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_wkv4 import arguments as arguments4
from .test_wkv4 import full as full4
from .test_wkv7 import arguments as arguments7
from .test_wkv7 import full as full7

pytestmark = needs_triton


@pytest.mark.parametrize("keys", [2.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 11, 3), (1, 8, 20), *([(2, 1000, 100)] if NATIVE else [])])
def test_wkv4_equals_the_step_loop(shape: tuple[int, int, int], keys: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of any size: numerator and denominator share an exponent."""
    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(full4, wkv4), partial(full4, wkv4_reference), arguments4(*shape, keys=keys))
    assert launched == ["wkv4_kernel", "wkv4_gradient_kernel"]


@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (3, 4, 5)), (1, (1, 8, 10))])
def test_wkv4_documents(rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(rows, 11, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments4(2, 11, 3)
    slow = partial(full4, wkv4_reference, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(full4, wkv4, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(partial(full4, wkv4), slow, inputs, torch.float32)) > 1e-3  # negative control


def test_wkv4_from_nothing_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    with triton_chosen(monkeypatch):
        assert_close(lambda *x: wkv4(*x)[0], lambda *x: wkv4_reference(*x)[0], arguments4(1, 9, 3)[:4], torch.bfloat16)
    assert EMPTY[2] > torch.finfo(torch.float32).min


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


def test_wkv4_tokens_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    far = 1 << 30
    k, v, log_decay, bonus = (x.detach() for x in arguments4(1, 4, 3)[:4])
    storage = torch.empty(3 * far + 3, device=DEVICE)
    distant = storage.as_strided((1, 4, 3), (4 * far, far, 1)).copy_(k)
    with triton_chosen(monkeypatch):
        y, _ = wkv4(distant, *(x.float().to(DEVICE) for x in (v, log_decay, bonus)))
    assert relative_error(y.cpu(), wkv4_reference(k, v, log_decay, bonus)[0]) < FLOAT32_BOUND
