"""Selective scan against the step loop: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import selective_scan
from longstride.kernels.selective_scan import recurrence as recurrences
from longstride.kernels.selective_scan.portable import SelectiveScan
from longstride.kernels.selective_scan.recurrence import Recurrence, SegmentPlan
from longstride.kernels.selective_scan.reference import selective_scan_reference

from .compare import assert_same, leaf, outputs_and_gradients, relative_error, start_mask, worst_error

NAMES = ("u_BTD", "delta_BTD", "A_DN", "B_BTN", "C_BTN", "D", "z_BTD", "delta_bias", "initial_state")


def arguments(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    rates = -leaf(channels, states, seed=3).detach().abs() * 2 - 0.01
    return [
        leaf(batch, length, channels, seed=1),
        leaf(batch, length, channels, seed=2),
        rates.requires_grad_(),
        leaf(batch, length, states, seed=4),
        leaf(batch, length, states, seed=5),
        leaf(channels, seed=6),
        leaf(batch, length, channels, seed=7),
        leaf(channels, seed=8),
        leaf(batch, channels, states, seed=9),
    ]


def full(function, *inputs: Tensor, **options):
    """Call with every optional tensor."""
    return function(*inputs[:5], **dict(zip(NAMES[5:], inputs[5:], strict=True)), **options)


SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 3, 4),
    (1, 65, 2, 3),
    (2, 129, 5, 2),
    (3, 1000, 2, 2),
    (1, 137, 300, 16),
    (2, 70, 200, 16),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softplus", [True, False])
def test_equals_the_step_loop(shape: tuple[int, int, int, int], softplus: bool) -> None:
    inputs = arguments(*shape)
    if not softplus:  # step sizes must be positive
        inputs[1] = inputs[1].detach().abs().requires_grad_()
        inputs[7] = inputs[7].detach().abs().requires_grad_()
    fast = partial(full, selective_scan, delta_softplus=softplus)
    assert_same(fast, partial(full, selective_scan_reference, delta_softplus=softplus), inputs)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "positions", [(0,), (1, 2, 3), (63, 64), (127, 128, 129), (299,), (0, 16, 31, 32, 33, 255, 256)]
)
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...]) -> None:
    inputs = arguments(2, 300, 3, 4)
    starts = start_mask(rows, 300, *[(index % rows, position) for index, position in enumerate(positions)])
    options = {"delta_softplus": True, "document_starts": starts}
    fast, slow = partial(full, selective_scan, **options), partial(full, selective_scan_reference, **options)
    assert_same(fast, slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(partial(full, selective_scan, delta_softplus=True), slow, inputs) > 1e-3


def test_states_and_gradients_cross_short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrences, "_SEGMENT_ELEMENTS", 1)
    assert SegmentPlan.choose(200, 24, torch.device("cpu")).segment == 64
    inputs, starts = arguments(2, 200, 3, 4), start_mask(2, 200, (0, 63), (0, 64), (1, 100))
    for mask in (None, starts):
        options = {"delta_softplus": True, "document_starts": mask}
        fast, slow = (partial(full, scan, **options) for scan in (selective_scan, selective_scan_reference))
        assert_same(fast, slow, inputs)


def test_only_the_required_arguments() -> None:
    inputs = arguments(2, 33, 3, 2)[:5]
    inputs[1] = inputs[1].detach().abs().requires_grad_()
    assert_same(selective_scan, selective_scan_reference, inputs)


@pytest.mark.parametrize("cut", [1, 50, 99])
def test_a_cut_anywhere_changes_nothing(cut: int) -> None:
    """Two pieces joined by their state equal the whole, gradients through the state included."""

    def joined(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        pieces = []
        state = inputs[8]
        for part in (slice(0, cut), slice(cut, None)):
            cut_inputs = [x[:, part] if index in (0, 1, 3, 4, 6) else x for index, x in enumerate(inputs)]
            y_BTD, state = full(selective_scan, *cut_inputs[:8], state, delta_softplus=True)
            pieces.append(y_BTD)
        return torch.cat(pieces, 1), state

    inputs = arguments(2, 100, 3, 4)
    assert_same(joined, partial(full, selective_scan, delta_softplus=True), inputs)


def test_comparison_notices_a_wrong_gradient() -> None:
    """Negative control: dropping the gradient of the final state, as the stock kernel does, must not pass."""

    def dropped(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        y_BTD, state = full(selective_scan, *inputs)
        return y_BTD, state.detach()

    inputs = arguments(1, 20, 2, 2)
    inputs[1] = inputs[1].detach().abs().requires_grad_()
    assert worst_error(dropped, partial(full, selective_scan_reference), inputs) > 1e-3


@pytest.mark.parametrize("length", [1, 6])
def test_gradcheck(length: int) -> None:
    inputs = arguments(2, length, 2, 2)
    starts = start_mask(1, length, (0, length // 2)) if length > 1 else None
    fast = partial(full, selective_scan, delta_softplus=True, document_starts=starts)
    assert torch.autograd.gradcheck(fast, tuple(inputs))


def test_softplus_is_linear_beyond_twenty_in_both_passes() -> None:
    inputs = arguments(1, 12, 2, 2)
    inputs[1] = (inputs[1].detach() * 30).requires_grad_()
    fast = partial(full, selective_scan, delta_softplus=True)
    assert_same(fast, partial(full, selective_scan_reference, delta_softplus=True), inputs)


def test_strong_decay_stays_finite() -> None:
    """Summed exponents far below the smallest float: nothing is ever divided by a product of decays."""
    inputs = [x.detach().float().requires_grad_() for x in arguments(1, 300, 4, 4)]
    inputs[2] = torch.full((4, 4), -1000.0, requires_grad=True)
    outputs, gradients = outputs_and_gradients(partial(full, selective_scan, delta_softplus=True), inputs)
    assert all(torch.isfinite(x).all() for x in outputs + gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype: torch.dtype) -> None:
    """float32, and bfloat16 with float32 states, against float64 on the same rounded inputs."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in arguments(2, 200, 4, 4)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    fast = partial(full, selective_scan, delta_softplus=True)
    outputs, gradients = outputs_and_gradients(fast, inputs)
    expected, expected_gradients = outputs_and_gradients(fast, exact)
    assert outputs[0].dtype == dtype and outputs[1].dtype == torch.float32
    assert [g.dtype for g in gradients] == [dtype] * len(gradients)
    bound = 5e-6 if dtype == torch.float32 else 2e-2
    pairs = zip(outputs + gradients, expected + expected_gradients, strict=True)
    assert max(relative_error(value, want) for value, want in pairs) < bound


def test_no_gradient_for_what_needs_none() -> None:
    inputs = [x.detach() for x in arguments(1, 40, 2, 2)]
    inputs[0].requires_grad_()
    y_BTD, state = full(selective_scan, *inputs, delta_softplus=True)
    (y_BTD.sum() + state.sum()).backward()
    assert inputs[0].grad is not None and all(x.grad is None for x in inputs[1:])


def test_nothing_of_length_times_states_is_kept() -> None:
    """What is saved for the backward: the arguments and one state per segment."""
    batch, length, channels, states = 1, 4096, 256, 16
    inputs = [x.detach().float().requires_grad_() for x in arguments(batch, length, channels, states)[:5]]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        selective_scan(*inputs, delta_softplus=True)
    assert saved and max(x.numel() for x in saved) <= length * channels
    plan = SegmentPlan.choose(length, batch * channels * states, torch.device("cpu"))
    assert plan.segment <= 256


@pytest.mark.parametrize("levels", [0, 1, 4])
@pytest.mark.parametrize("tokens", [16, 48])
def test_both_recurrences_either_way(levels: int, tokens: int) -> None:
    """Run twice over the same buffers: the views are made once, the numbers change."""
    decay, x = torch.empty(tokens, 5, dtype=torch.float64), torch.empty(tokens + 1, 5, dtype=torch.float64)
    forward, backward = x.clone(), x.clone()
    scratch = torch.empty_like(decay)
    runs = Recurrence(forward, decay, scratch, levels), Recurrence(backward, decay, scratch, levels, reverse=True)
    for _ in range(2):
        decay.uniform_(), x.normal_(), forward.copy_(x), backward.copy_(x)
        for recurrence in runs:
            recurrence.run()
        state_forward, state_backward = x[0], x[-1]
        for t in range(tokens):
            state_forward = x[t + 1] + decay[t] * state_forward
            state_backward = x[tokens - 1 - t] + decay[tokens - 1 - t] * state_backward
            torch.testing.assert_close(forward[t + 1], state_forward, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(backward[tokens - 1 - t], state_backward, rtol=1e-12, atol=1e-12)


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 3, 2)
    y_BTD, state = full(selective_scan, *inputs)
    assert y_BTD.shape == (2, 0, 3)
    torch.testing.assert_close(state, inputs[8])
    (gradient,) = torch.autograd.grad(state.sum(), inputs[8])
    assert (gradient == 1).all()


def test_wrong_shapes_are_named() -> None:
    u, delta, A, B, C = (x.detach() for x in arguments(2, 5, 3, 4)[:5])
    with pytest.raises(ValueError, match=r"B_BTN has shape \(2, 5, 3\), expected \(2, 5, 4\)"):
        selective_scan(u, delta, A, B[..., :3], C)
    with pytest.raises(ValueError, match="boolean"):
        selective_scan(u, delta, A, B, C, document_starts=torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"expected \(2 or 1, 5\)"):
        selective_scan(u, delta, A, B, C, document_starts=torch.zeros(3, 5, dtype=torch.bool))
    assert issubclass(SelectiveScan, torch.autograd.Function)
