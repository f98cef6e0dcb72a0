"""RWKV-4's compiled recurrence, and its state alone, against the step loop: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.wkv4 import EMPTY, wkv4, wkv4_state
from longstride.kernels.wkv4.compiled import CompiledWkv4
from longstride.kernels.wkv4.portable import Wkv4
from longstride.kernels.wkv4.reference import wkv4_reference

from .compare import assert_same, compiler_is_here, leaf, outputs_and_gradients, relative_error, start_mask, worst_error
from .test_wkv4 import arguments, full

pytestmark = pytest.mark.skipif(not compiler_is_here(), reason="no C++ compiler or no ninja on this machine")


def recurrence(*inputs: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return CompiledWkv4.apply(*inputs, starts)


def state_alone(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None = None) -> Tensor:
    return CompiledWkv4.apply(k, v, log_decay, None, state, starts)[1]


def last(k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor | None = None) -> Tensor:
    bonus = torch.zeros_like(log_decay)
    return wkv4_reference(k, v, log_decay, bonus, initial_state=state, document_starts=starts)[1]


SHAPES = [(1, 1, 1), (2, 7, 3), (1, 64, 8), (2, 65, 9), (3, 129, 50), (1, 700, 17)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_step_loop(shape: tuple[int, int, int], threads: int) -> None:
    inputs = arguments(*shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(recurrence, partial(full, wkv4_reference), inputs)
        assert_same(state_alone, last, [*inputs[:3], inputs[4]])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (63, 64), (64, 65, 66, 90), (199,)])
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...]) -> None:
    inputs = arguments(2, 200, 9)
    starts = start_mask(rows, 200, *[(index % rows, position) for index, position in enumerate(positions)])
    slow = partial(full, wkv4_reference, document_starts=starts)
    assert_same(partial(recurrence, starts=starts), slow, inputs)
    assert_same(partial(state_alone, starts=starts), partial(last, starts=starts), [*inputs[:3], inputs[4]])
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(recurrence, slow, inputs) > 1e-6


def test_nothing_before_the_first_token() -> None:
    inputs = arguments(2, 100, 9)
    empty = leaf(2, 9, 3, seed=0).detach().copy_(torch.tensor(EMPTY, dtype=torch.float64)).requires_grad_()
    assert_same(recurrence, partial(full, wkv4_reference), [*inputs[:4], empty])


@pytest.mark.parametrize("low", [-5.0, 5.0])
def test_an_exponent_older_than_every_key(low: float) -> None:
    """The gradient of the last exponent goes to the key that set it, or to the entering one."""
    inputs = arguments(1, 150, 9)
    inputs[2] = (inputs[2].detach() * 1e-3).requires_grad_()
    inputs[0] = (inputs[0].detach() * 0.1 + low).requires_grad_()
    assert_same(recurrence, partial(full, wkv4_reference), inputs)


def test_keys_of_any_size() -> None:
    k, v, log_decay, bonus, state = (x.detach() for x in arguments(1, 200, 4, keys=300.0))
    k[:, 100:] -= 3000
    expected, _ = wkv4_reference(k, v, log_decay, bonus, initial_state=state)
    y, final = recurrence(k, v, log_decay, bonus, state)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(final).all()


def test_single_precision_beside_the_oracle() -> None:
    """No worse than PyTorch's own code."""
    singles = [x.detach().float().requires_grad_() for x in arguments(2, 500, 20)]
    doubles = [x.detach().double().requires_grad_() for x in singles]
    exact = outputs_and_gradients(partial(full, wkv4_reference), doubles)
    fast = outputs_and_gradients(recurrence, singles)
    portable = outputs_and_gradients(lambda *a: Wkv4.apply(*a, None), singles)
    for x, y, expected in zip(*(outputs + gradients for outputs, gradients in (fast, portable, exact)), strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, expected) < max(1e-6, 2 * relative_error(y, expected))


def test_slices_need_no_copies() -> None:
    """Keys and values cut out of a wider tensor."""
    inputs = arguments(2, 70, 9)

    def cut(k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return recurrence(*torch.cat((k, v), -1).split(9, -1), *rest)

    assert_same(cut, partial(full, wkv4_reference), inputs)


def test_the_public_door_chooses_it() -> None:
    inputs = [x.detach().float().requires_grad_() for x in arguments(1, 8192, 64)]
    assert type(full(wkv4, *inputs)[0].grad_fn).__name__ == "CompiledWkv4Backward"
    assert type(wkv4_state(*inputs[:3]).grad_fn).__name__ == "CompiledWkv4Backward"
    half = [x.bfloat16() if index < 2 else x for index, x in enumerate(inputs)]
    assert type(full(wkv4, *half)[0].grad_fn).__name__ == "Wkv4Backward"
    assert type(full(wkv4, *arguments(1, 40, 4))[0].grad_fn).__name__ == "Wkv4Backward"
