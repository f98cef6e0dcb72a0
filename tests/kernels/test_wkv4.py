"""RWKV-4's recurrence and its summary against the step loop: outputs and every gradient in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.wkv4 import EMPTY, wkv4, wkv4_state
from longstride.kernels.wkv4.reference import wkv4_reference

from .compare import assert_same, leaf, relative_error, start_mask, worst_error


def arguments(batch: int, length: int, channels: int, keys: float = 2.0) -> list[Tensor]:
    log_decay = -torch.exp(leaf(channels, seed=3).detach() * 2 - 2)
    state = leaf(batch, channels, 3, seed=5).detach()
    state[..., 1] = state[..., 1].abs() + 0.1
    return [
        leaf(batch, length, channels, seed=1, scale=keys),
        leaf(batch, length, channels, seed=2),
        log_decay.requires_grad_(),
        leaf(channels, seed=4),
        state.requires_grad_(),
    ]


def full(function, *inputs: Tensor, **options):
    return function(*inputs[:4], initial_state=inputs[4], **options)


SHAPES = [(1, 1, 1), (2, 7, 3), (1, 64, 2), (2, 65, 3), (3, 1000, 2), (1, 700, 600), (1, 5000, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_step_loop(shape: tuple[int, int, int]) -> None:
    assert_same(partial(full, wkv4), partial(full, wkv4_reference), arguments(*shape))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (15, 16), (64, 65, 66, 90), (299,), (0, 32, 96, 255, 256)])
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...]) -> None:
    inputs = arguments(2, 300, 3)
    starts = start_mask(rows, 300, *[(index % rows, position) for index, position in enumerate(positions)])
    fast, slow = partial(full, wkv4, document_starts=starts), partial(full, wkv4_reference, document_starts=starts)
    assert_same(fast, slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(partial(full, wkv4), slow, inputs) > 1e-6
    nothing = inputs[0].new_tensor(EMPTY).expand(2, 3, 3)

    def summary(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return wkv4_state(k, v, log_decay, document_starts=starts)

    def last(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return wkv4_reference(k, v, log_decay, inputs[3], initial_state=nothing, document_starts=starts)[1]

    assert_same(summary, last, inputs[:3])


def test_only_the_required_arguments() -> None:
    assert_same(wkv4, wkv4_reference, arguments(2, 40, 3)[:4])


@pytest.mark.parametrize("length", [1, 64, 1000])
def test_summary_is_the_final_state(length: int) -> None:
    def last(k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return wkv4_reference(k, v, log_decay, torch.zeros_like(log_decay))[1]

    assert_same(wkv4_state, last, arguments(2, length, 3)[:3])


@pytest.mark.parametrize("cut", [1, 64, 99])
def test_a_cut_anywhere_changes_nothing(cut: int) -> None:
    def joined(k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        left, state = wkv4(k[:, :cut], v[:, :cut], log_decay, bonus, initial_state=state)
        right, state = wkv4(k[:, cut:], v[:, cut:], log_decay, bonus, initial_state=state)
        return torch.cat((left, right), 1), state

    assert_same(joined, partial(full, wkv4_reference), arguments(2, 150, 3))


def test_keys_of_any_size() -> None:
    """Exponentials of these keys overflow or vanish even in double precision; the means they weigh do not."""
    k, v, log_decay, bonus, _ = (x.detach() for x in arguments(1, 200, 4, keys=300.0))
    k[:, 100:] -= 3000
    expected, _ = wkv4_reference(k, v, log_decay, bonus)
    y, state = wkv4(k, v, log_decay, bonus)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(state).all()
    single, _ = wkv4(k.float(), v.float(), log_decay.float(), bonus.float())
    exact, _ = wkv4_reference(*[x.float().double() for x in (k, v, log_decay, bonus)])
    # exponents near 3,000 are rounded to 2e-4 in single precision
    assert relative_error(single, exact) < 1e-3


def test_single_precision_beside_the_oracle() -> None:
    singles = [x.detach().float() for x in arguments(1, 3000, 8)]
    exact, exact_state = full(wkv4_reference, *[x.double() for x in singles])
    y, state = full(wkv4, *singles)
    assert y.dtype == state.dtype == torch.float32
    assert relative_error(y, exact) < 3e-6
    # the exponent itself is rounded at every token, in the step loop too
    _, loop_state = full(wkv4_reference, *singles)
    assert relative_error(state, exact_state) < max(3e-6, 1.5 * relative_error(loop_state, exact_state))


def test_gradcheck() -> None:
    inputs = arguments(1, 6, 2)
    assert torch.autograd.gradcheck(partial(full, wkv4, document_starts=start_mask(1, 6, (0, 3))), tuple(inputs))
    assert torch.autograd.gradcheck(partial(full, wkv4), tuple(inputs))


def test_causal() -> None:
    inputs = arguments(1, 140, 2)
    y, _ = wkv4(*inputs[:4])
    for gradient in torch.autograd.grad(y[:, 70].sum(), inputs[:2]):
        assert (gradient[:, 71:] == 0).all()
        assert gradient[:, 70].any()


def test_bfloat16_in_and_out() -> None:
    inputs = [x.detach() for x in arguments(2, 100, 3)[:4]]
    y, state = wkv4(inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2].float(), inputs[3].float())
    expected, _ = wkv4(inputs[0].bfloat16().double(), inputs[1].bfloat16().double(), *inputs[2:])
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(y, expected) < 1e-2


def test_empty_sequence_passes_the_state_on() -> None:
    inputs = arguments(2, 0, 3)
    y, state = full(wkv4, *inputs)
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(state, inputs[4])
    assert (wkv4_state(*inputs[:3])[0, 0] == torch.tensor(EMPTY, dtype=torch.float64)).all()


def test_wrong_shapes_are_named() -> None:
    k, v, log_decay, bonus = (x.detach() for x in arguments(2, 5, 3)[:4])
    with pytest.raises(ValueError, match=r"v_BTD has shape \(2, 4, 3\), expected \(2, 5, 3\)"):
        wkv4(k, v[:, 1:], log_decay, bonus)
