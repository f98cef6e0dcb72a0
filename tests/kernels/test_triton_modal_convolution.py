"""The Triton modal convolution against the step loop in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.modal_convolution import modal_convolution
from longstride.kernels.modal_convolution.reference import modal_convolution_reference

from .compare import start_mask
from .native import DEVICE, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_modal_convolution import arguments, full

pytestmark = needs_triton

SHAPES = [(1, 1, 1, 1), (2, 21, 3, 3), (1, 9, 18, 2), (1, 16, 2, 5)]
if NATIVE:
    SHAPES += [(2, 1000, 40, 16), (1, 300, 33, 64)]


CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, torch.bfloat16) for shape in ([(1, 19, 3, 2)] if not NATIVE else SHAPES)]


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_equals_the_step_loop(
    shape: tuple[int, int, int, int], dtype: torch.dtype, turning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bfloat16: activations and real modes; complex modes stay single."""
    fast, slow = partial(full, modal_convolution), partial(full, modal_convolution_reference)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, arguments(*shape, turning), dtype)
    assert launched.count("mode_gradient_kernel") == 2


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (7, 8, 9)), (1, (3, 16, 20))])
def test_documents(rows: int, positions: tuple[int, ...], turning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(rows, 21, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments(2, 21, 3, 2, turning)
    slow = partial(full, modal_convolution_reference, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(full, modal_convolution, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(partial(full, modal_convolution), slow, inputs, torch.float32)) > 1e-3  # negative control


def test_without_skip_and_state_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    def sliced(function, u: Tensor, poles: Tensor, residues: Tensor) -> Tensor:
        return function(u[..., 1:], poles[1:], residues[1:])[0]

    with triton_chosen(monkeypatch):
        inputs = arguments(1, 12, 4, 2, True)[:3]
        assert_close(partial(sliced, modal_convolution), partial(sliced, modal_convolution_reference), inputs)
