"""The selective scan in two stages, portable and compiled, against the step loop from the true state, in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longstride.kernels import begin_selective_scan, compiled, selective_scan
from longstride.kernels.living import negligible_exponent
from longstride.kernels.selective_scan import recurrence as recurrences
from longstride.kernels.selective_scan.readout import Steps, living_bands
from longstride.kernels.selective_scan.reference import selective_scan_reference
from longstride.kernels.selective_scan.stages import Entering

from .compare import assert_same, compiler_is_here, outputs_and_gradients, relative_error, start_mask, worst_error
from .test_selective_scan import arguments

NO_COMPILER = pytest.mark.skipif(not compiler_is_here(), reason="no C++ compiler or no ninja on this machine")


@pytest.fixture(params=["portable", pytest.param("compiled", marks=NO_COMPILER)])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which code the door chooses on a CPU."""
    monkeypatch.setattr(compiled, "LEAST_WORK", 0 if request.param == "compiled" else 1 << 60)
    return request.param


pytestmark = pytest.mark.usefixtures("code")


def stage_arguments(batch: int, length: int, channels: int, states: int, speed: float = 1.0) -> list[Tensor]:
    """u, step sizes, A, B, C, D, bias, the state that enters; the fastest channel's steps are about `speed`."""
    inputs = arguments(batch, length, channels, states)
    spread = torch.logspace(-2, 0, channels, dtype=torch.float64)
    inputs[1] = (inputs[1].detach().abs() * spread * speed).requires_grad_()
    inputs[7] = (inputs[7].detach().abs() * 1e-3 * speed).requires_grad_()
    return [*inputs[:6], *inputs[7:]]


def staged(*inputs: Tensor, softplus: bool = False, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs, and the state that leaves as a split sequence composes it."""
    u, delta, A, B, C, D, bias, state = inputs
    options = {"D": D, "delta_bias": bias, "delta_softplus": softplus, "document_starts": starts}
    stages = begin_selective_scan(u, delta, A, B, C, **options)
    decay = torch.exp(A.detach() * stages.steps.unsqueeze(-1))
    if starts is not None:
        decay = decay * ~starts.any(1)[:, None, None]
    return stages.finish(state), stages.leaving + decay * state


def stepped(*inputs: Tensor, softplus: bool = False, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, bias, state = inputs
    options = {"D": D, "delta_bias": bias, "delta_softplus": softplus, "document_starts": starts}
    return selective_scan_reference(u, delta, A, B, C, **options, initial_state=state)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 31, 3, 4), (2, 257, 17, 5), (1, 700, 40, 3)])
@pytest.mark.parametrize("speed", [1e-3, 0.1, 30.0])
def test_equals_the_step_loop_from_the_true_state(shape: tuple[int, int, int, int], speed: float) -> None:
    """States that live to the end, that fade on the way, and that are gone at once."""
    assert_same(staged, stepped, stage_arguments(*shape, speed=speed))


def test_step_sizes_behind_a_softplus_on_two_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_same(partial(staged, softplus=True), partial(stepped, softplus=True), stage_arguments(2, 90, 17, 4))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("starts", [((0, 0),), ((0, 40), (1, 0)), ((0, 1), (0, 90), (1, 119)), ((1, 64),), ((1, 32),)])
def test_the_state_ends_at_the_first_document(starts: tuple[tuple[int, int], ...]) -> None:
    inputs = stage_arguments(2, 120, 17, 3, speed=0.05)
    mask = start_mask(2, 120, *starts)
    assert_same(partial(staged, starts=mask), partial(stepped, starts=mask), inputs)
    assert worst_error(staged, partial(stepped, starts=mask), inputs) > 1e-3  # negative control


@pytest.mark.parametrize("starts", [None, ((0, 10), (1, 70)), ((0, 64), (1, 130))])
def test_the_state_crosses_short_segments(
    starts: tuple[tuple[int, int], ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that a document has ended is in no later segment's either."""
    monkeypatch.setattr(recurrences, "_SEGMENT_ELEMENTS", 1)
    inputs = stage_arguments(2, 150, 17, 3, speed=0.05)
    mask = None if starts is None else start_mask(2, 150, *starts)
    assert_same(partial(staged, starts=mask), partial(stepped, starts=mask), inputs)


def test_one_row_of_starts_for_the_batch() -> None:
    inputs, mask = stage_arguments(2, 120, 3, 3, speed=0.05), start_mask(1, 120, (0, 70))
    assert_same(partial(staged, starts=mask), partial(stepped, starts=mask), inputs)


def test_rates_of_zero_and_above_stay_alive() -> None:
    inputs = stage_arguments(1, 500, 3, 2)
    rates = inputs[2].detach().clone()
    rates[0, 0], rates[2, 1] = 0.0, 1e-3
    inputs[2] = rates.requires_grad_()
    assert_same(staged, stepped, inputs)


def pieces(*inputs: Tensor, forget: bool = False) -> tuple[Tensor, Tensor]:
    """A sequence in three parts, each begun before any state has arrived."""
    u, delta, A, B, C, D, bias, state = inputs
    parts = [slice(0, 33), slice(33, 34), slice(34, None)]
    stages = [
        begin_selective_scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], D=D, delta_bias=bias)
        for part in parts
    ]
    outputs = []
    for stage in stages:
        outputs.append(stage.finish(state))
        if forget:
            stage._entering.state_BDN = None
        state = stage.leaving + torch.exp(A.detach() * stage.steps.unsqueeze(-1)) * state
    return torch.cat(outputs, 1), state


def test_parts_begun_at_once_equal_the_whole() -> None:
    inputs = stage_arguments(2, 100, 9, 3, speed=0.1)
    assert_same(pieces, stepped, inputs)
    # negative control: a backward that does not know of the entering state
    assert worst_error(partial(pieces, forget=True), stepped, inputs) > 1e-3


def test_only_the_leaving_state_is_used() -> None:
    """The last stage's backward never runs, and the gradients still are those of the true state."""
    inputs = stage_arguments(1, 50, 9, 3, speed=0.1)
    assert_same(lambda *x: staged(*x)[1], lambda *x: stepped(*x)[1], inputs)


def test_expanded_and_strided_gradients() -> None:
    inputs = stage_arguments(2, 70, 9, 4, speed=0.1)

    def mean(function, *x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = function(*x)
        return y.mean(0), state.mT.sum(0) + y.mT[0, :4, :9].sum()

    assert_same(partial(mean, staged), partial(mean, stepped), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype).requires_grad_() for x in stage_arguments(2, 200, 17, 4, speed=0.05)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    outputs, gradients = outputs_and_gradients(staged, inputs)
    expected, expected_gradients = outputs_and_gradients(stepped, exact)
    assert outputs[0].dtype == dtype and outputs[1].dtype == torch.float32
    bound = 5e-6 if dtype == torch.float32 else 2e-2
    pairs = zip(outputs + gradients, expected + expected_gradients, strict=True)
    assert max(relative_error(value, want) for value, want in pairs) < bound


class Made(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() and not any(result is x for x in args):
            known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            if result.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, result.numel())
        return result


def test_the_last_stage_makes_nothing_of_the_sequences_length(code: str) -> None:
    """Forward and backward, and what is kept is what one process keeps and the sums of step sizes."""
    length, channels, states = 2048, 32, 2
    inputs = [x.detach().float().requires_grad_() for x in stage_arguments(1, length, channels, states, speed=0.1)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        stages = begin_selective_scan(*inputs[:5])
        alone = len(saved)
        selective_scan(*inputs[:5])
    begun, whole = (sum(x.numel() for x in part) for part in (saved[:alone], saved[alone:]))
    assert whole <= begun <= whole + length * channels // 32
    if code == "portable":  # it takes out the tokens of a band, into a scratch of a fixed size
        return
    gradient = torch.ones(1, length, channels)
    with Made() as made:
        y = stages.finish(inputs[7])
        torch.autograd.grad(y, inputs[7], gradient, retain_graph=True)
    assert made.largest < length * channels // 8
    with Made() as made:
        torch.zeros_like(y)
    assert made.largest == length * channels  # negative control


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_stops_only_below_rounding(dtype: torch.dtype) -> None:
    """States that decay steadily: the outputs are exact up to the promised size, and then zero."""
    length, step, channels, states = 4096, 0.05, 32, 16
    state, A = torch.ones(1, channels, states, dtype=dtype), torch.ones(channels, states, dtype=dtype)
    C = torch.full((1, length, states), 1 / states, dtype=dtype)
    u, delta = torch.zeros(1, length, channels, dtype=dtype), torch.full((1, length, channels), step, dtype=dtype)
    y = begin_selective_scan(u, delta, -A, C, C).finish(state)[0, :, 5].double()
    expected = torch.exp(-step * torch.arange(1, length + 1, dtype=torch.float64))
    eps = torch.finfo(dtype).eps
    assert negligible_exponent(dtype) > -torch.log(torch.tensor(eps)).item() * 1.4
    assert (y - expected).abs().max() < 100 * eps
    alive = expected > eps**1.5
    assert ((y - expected).abs()[alive] / expected[alive]).max() < 1e3 * eps
    assert (y[-1] == 0).all()


def test_the_portable_read_out_is_a_small_part_of_the_scans_work() -> None:
    """Step sizes and rates of a fresh Mamba layer, 16,384 tokens."""
    length, channels, states = 16384, 256, 16
    delta = torch.logspace(-3, -1, channels).expand(1, length, channels).contiguous()
    rates = -torch.arange(1.0, states + 1).repeat(channels, 1)
    bands = living_bands(Steps(delta, None, False), rates, length)
    work = sum(piece.sum_Bks[0, 0].numel() * piece.rate_mk1.numel() for band in bands for piece in band.pieces())
    assert work < 0.15 * length * channels * states


def test_empty_sequence() -> None:
    inputs = stage_arguments(2, 0, 3, 2)
    y, leaving = staged(*inputs)
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(leaving, inputs[7])


def test_wrong_shapes_are_named() -> None:
    u, delta, A, B, C, _, _, state = (x.detach() for x in stage_arguments(2, 5, 3, 4))
    with pytest.raises(ValueError, match=r"B_BTN has shape \(2, 5, 3\), expected \(2, 5, 4\)"):
        begin_selective_scan(u, delta, A, B[..., :3], C)
    with pytest.raises(ValueError, match=r"entering_BDN has shape \(2, 3, 3\), expected \(2, 3, 4\)"):
        begin_selective_scan(u, delta, A, B, C).finish(state[..., :3])


def test_sums_before_each_kept_state() -> None:
    entering = Entering()
    before = entering.note(torch.tensor([[[1.0], [2.0], [4.0]]]))
    again, steps = entering.take_sums()
    assert before.flatten().tolist() == again.flatten().tolist() == [0, 1, 3] and steps.tolist() == [[7]]
