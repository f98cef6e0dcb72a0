"""The Triton modal convolution, whole and in stages, against the step loop in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.modal_convolution import modal_convolution
from longstride.kernels.modal_convolution.reference import modal_convolution_reference

from .compare import start_mask
from .native import DEVICE, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_modal_convolution import WHOLE_AND_STAGED, arguments

pytestmark = needs_triton

SHAPES = [(1, 1, 1, 1), (2, 21, 3, 3), (1, 9, 18, 2), (1, 16, 2, 5)]
if NATIVE:
    SHAPES += [(2, 1000, 40, 16), (1, 300, 33, 64)]


CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, torch.bfloat16) for shape in ([(1, 19, 3, 2)] if not NATIVE else SHAPES)]


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_equals_the_step_loop(
    way: str, shape: tuple[int, int, int, int], dtype: torch.dtype, turning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bfloat16: activations and real modes; complex modes stay single."""
    with triton_chosen(monkeypatch) as launched:
        assert_close(*WHOLE_AND_STAGED[way], arguments(*shape, turning), dtype)
    # in stages, the gradient of the leaving state is a walk of its own
    assert launched.count("mode_gradient_kernel") == (3 if way == "staged" else 2)


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (7, 8, 9)), (1, (3, 16, 20))])
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_documents(
    way: str, rows: int, positions: tuple[int, ...], turning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = WHOLE_AND_STAGED[way]
    starts = start_mask(rows, 21, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments(2, 21, 3, 2, turning)
    slow = partial(slow, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(fast, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(fast, slow, inputs, torch.float32)) > 1e-3  # negative control


def test_without_skip_and_state_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    def sliced(function, u: Tensor, poles: Tensor, residues: Tensor) -> Tensor:
        return function(u[..., 1:], poles[1:], residues[1:])[0]

    with triton_chosen(monkeypatch):
        inputs = arguments(1, 12, 4, 2, True)[:3]
        assert_close(partial(sliced, modal_convolution), partial(sliced, modal_convolution_reference), inputs)
