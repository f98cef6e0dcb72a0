"""The Triton modal convolution against the step loop in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.modal_convolution import modal_convolution
from longstride.kernels.modal_convolution.reference import modal_convolution_reference

from .compare import relative_error, start_mask
from .native import DEVICE, FLOAT32_BOUND, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_modal_convolution import arguments, full

pytestmark = needs_triton

SHAPES = [(1, 1, 1, 1), (2, 21, 3, 3), (1, 9, 18, 2), (1, 16, 2, 5)]
if NATIVE:
    SHAPES += [(2, 1000, 40, 16), (1, 300, 33, 64)]


@pytest.mark.parametrize("turning", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_step_loop(shape: tuple[int, int, int, int], turning: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = partial(full, modal_convolution), partial(full, modal_convolution_reference)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, arguments(*shape, turning))
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


def test_bfloat16_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations in bfloat16 beside float32 modes, as mixers have them."""
    u, poles, residues = (x.detach() for x in arguments(1, 19, 3, 2, True)[:3])
    rounded = u.bfloat16()
    with triton_chosen(monkeypatch):
        y, last = modal_convolution(
            rounded.to(DEVICE), poles.to(DEVICE, torch.complex64), residues.to(DEVICE, torch.complex64)
        )
    expected, expected_last = modal_convolution_reference(rounded.double(), poles, residues)
    assert y.dtype == torch.bfloat16 and relative_error(y.cpu(), expected) < 1e-2
    assert relative_error(torch.view_as_real(last.cpu()), torch.view_as_real(expected_last)) < FLOAT32_BOUND


def test_tokens_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    far = 1 << 30
    u, poles, residues = (x.detach() for x in arguments(1, 4, 3, 2, False)[:3])
    storage = torch.empty(3 * far + 3, device=DEVICE)
    distant = storage.as_strided((1, 4, 3), (4 * far, far, 1)).copy_(u)
    with triton_chosen(monkeypatch):
        y, _ = modal_convolution(distant, poles.float().to(DEVICE), residues.float().to(DEVICE))
    assert relative_error(y.cpu(), modal_convolution_reference(u, poles, residues)[0]) < FLOAT32_BOUND
