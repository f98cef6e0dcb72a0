"""The Triton selective scan against the step loop in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import selective_scan
from longstride.kernels.selective_scan.reference import selective_scan_reference

from .compare import leaf, start_mask
from .native import DEVICE, FLOAT32_BOUND, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_selective_scan import arguments, full

pytestmark = needs_triton

# Several segments, a short last one, channels and states that fill no block; one segment only.
SHAPES = [(1, 21, 3, 3), (2, 9, 18, 4), (1, 3, 1, 1)]
if NATIVE:
    SHAPES += [(2, 2500, 70, 16), (1, 1031, 33, 64), (1, 600, 40, 256)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_step_loop(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fast = partial(full, selective_scan, delta_softplus=True)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, partial(full, selective_scan_reference, delta_softplus=True), arguments(*shape))
    assert launched[-1] == "backward_kernel" and "scan_kernel" in launched
    assert ("pass_kernel" in launched) or shape[1] < (256 if NATIVE else 9)


@pytest.mark.parametrize("positions", [(0,), (1, 2, 7, 8), (20,)])
def test_documents(positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(1, 21, *[(0, position) for position in positions])
    inputs = arguments(1, 21, 3, 3)
    slow = partial(full, selective_scan_reference, delta_softplus=True, document_starts=starts)
    fast = partial(full, selective_scan, delta_softplus=True, document_starts=starts.to(DEVICE))
    with triton_chosen(monkeypatch):
        assert_close(fast, slow, inputs)
        # Negative control: without the mask the result is far off.
        assert max(errors(partial(full, selective_scan, delta_softplus=True), slow, inputs, torch.float32)) > 1e-3


def test_a_mask_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(2, 13, (0, 3), (1, 8), (1, 12))
    slow = partial(full, selective_scan_reference, delta_softplus=True, document_starts=starts)
    fast = partial(full, selective_scan, delta_softplus=True, document_starts=starts.to(DEVICE))
    with triton_chosen(monkeypatch):
        assert_close(fast, slow, arguments(2, 13, 2, 2))


def test_only_the_required_arguments_and_shared_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gate, bias or direct term; gradients of B and C summed by atomic additions over two blocks of channels."""
    inputs = arguments(1, 13, 18, 2)[:5]
    inputs[1] = inputs[1].detach().abs()
    with triton_chosen(monkeypatch, deterministic=False):
        assert_close(selective_scan, selective_scan_reference, inputs)


def test_strided_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a wider projection, as mixers pass them, a transposed one and an expanded gradient."""

    def sliced(function, wide: Tensor, steps: Tensor, A: Tensor, projections: Tensor) -> Tensor:
        u, z = wide.chunk(2, -1)
        B, C = projections.transpose(1, 2).chunk(2, -1)
        y, _ = function(u, steps.abs(), A, B, C, z_BTD=z)
        return y.mean(0, keepdim=True).expand(2, -1, -1)

    inputs = [leaf(2, 11, 10), leaf(2, 11, 5, seed=1), -leaf(5, 3, seed=2).abs(), leaf(2, 6, 11, seed=3)]
    with triton_chosen(monkeypatch):
        assert_close(partial(sliced, selective_scan), partial(sliced, selective_scan_reference), inputs)


@pytest.mark.parametrize("shape", [(1, 19, 3, 3), *SHAPES[3:]])
def test_bfloat16(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision arguments, float32 states and sums: the error is that of rounding the results."""
    fast = partial(full, selective_scan, delta_softplus=True)
    slow = partial(full, selective_scan_reference, delta_softplus=True)
    with triton_chosen(monkeypatch):
        assert_close(fast, slow, arguments(*shape), torch.bfloat16)


def test_extreme_steps_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softplus far to either side, rates that erase a state at once; small steps keep their digits."""
    inputs = arguments(1, 26, 3, 3)
    spread = torch.linspace(-15.0, 40.0, 26, dtype=torch.float64)[None, :, None]
    inputs[1] = inputs[1].detach() * 0.1 + spread
    inputs[2] = torch.tensor([[-1e-4, -1.0, -1000.0]], dtype=torch.float64).repeat(3, 1)
    fast = partial(full, selective_scan, delta_softplus=True)
    slow = partial(full, selective_scan_reference, delta_softplus=True)
    with triton_chosen(monkeypatch):
        assert max(errors(fast, slow, inputs, torch.float32)) < 10 * FLOAT32_BOUND
        tiny = [x.detach()[:, :9] if x.dim() == 3 and x.shape[1] == 26 else x.detach() for x in inputs]
        tiny[1] = torch.full_like(tiny[1], -14.0)
        assert_close(fast, slow, tiny)


def test_a_cut_anywhere_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces joined by their state, gradients through it included, equal the reference of the whole."""

    def joined(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        pieces, state = [], inputs[8]
        for part in (slice(0, 11), slice(11, None)):
            cut = [x[:, part] if index in (0, 1, 3, 4, 6) else x for index, x in enumerate(inputs)]
            y_BTD, state = full(selective_scan, *cut[:8], state, delta_softplus=True)
            pieces.append(y_BTD)
        return torch.cat(pieces, 1), state

    slow = partial(full, selective_scan_reference, delta_softplus=True)
    with triton_chosen(monkeypatch):
        assert_close(joined, slow, arguments(1, 18, 3, 2))
