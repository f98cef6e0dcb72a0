"""Under autocast recurrences and convolutions compute in the dtypes of their arguments, forwards and backwards."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import (
    gated_linear_attention,
    long_convolution,
    selective_scan,
    short_convolution,
    wkv4_state,
    wkv7,
)

from . import test_gated_linear_attention as gla_cases
from . import test_modal_convolution as modal_cases
from . import test_selective_scan as scan_cases
from . import test_state_space_dual as dual_cases
from . import test_wkv7 as wkv7_cases
from .compare import leaf, outputs_and_gradients


def staged_wkv7(*inputs: Tensor) -> Tensor:
    return wkv7_cases.staged(*inputs)[0]


scan = partial(scan_cases.full, selective_scan, delta_softplus=True)
dual, modes = dual_cases.arguments, modal_cases.arguments
CASES: dict[str, tuple[Callable, Sequence[Tensor]]] = {
    "selective scan": (
        partial(scan_cases.full, selective_scan, delta_softplus=True),
        scan_cases.arguments(2, 70, 3, 4),
    ),
    "dual": (dual_cases.WHOLE_AND_STAGED["whole"][0], dual(2, 70, 4, 2, 2, 3)),
    "dual in stages": (dual_cases.WHOLE_AND_STAGED["staged"][0], dual(2, 70, 4, 2, 2, 3)),
    "gated linear attention": (partial(gla_cases.full, gated_linear_attention), gla_cases.arguments(2, 70, 2, 3, 2)),
    "modes": (modal_cases.WHOLE_AND_STAGED["whole"][0], modes(2, 70, 2, 2, False)),
    "modes in stages": (modal_cases.WHOLE_AND_STAGED["staged"][0], modes(2, 70, 2, 2, False)),
    "wkv4": (wkv4_state, [leaf(2, 70, 3, seed=1), leaf(2, 70, 3, seed=2), leaf(3, seed=3)]),
    "wkv7": (partial(wkv7_cases.full, wkv7), wkv7_cases.arguments(2, 70, 2, 4)),
    "wkv7 in stages": (staged_wkv7, wkv7_cases.arguments(2, 70, 2, 4)),
    "few taps": (short_convolution, [leaf(2, 70, 3, seed=1), leaf(3, 4, seed=2)]),
    "medium taps": (short_convolution, [leaf(2, 300, 3, seed=1), leaf(3, 20, seed=2)]),
    "many taps": (long_convolution, [leaf(2, 70, 3, seed=1), leaf(3, 70, seed=2)]),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name: str, backward: bool) -> None:
    if backward and name == "wkv7 in stages":
        pytest.skip("its last product is PyTorch's own, with PyTorch's backward")
    function, inputs = CASES[name]
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)  # one object entered twice would stay on at the end

    def forward(*x: Tensor) -> Tensor | Sequence[Tensor]:
        with autocast():
            assert torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16  # it is on
            return function(*x)

    outputs, gradients = outputs_and_gradients(function, inputs)
    with autocast() if backward else nullcontext():
        found, found_gradients = outputs_and_gradients(forward, inputs)
    for value, expected in zip(found + found_gradients, outputs + gradients, strict=True):
        assert torch.equal(value, expected)
    assert not torch.is_autocast_enabled("cpu")
