"""Every door with inputs that are views of other layouts and with gradients that are one row of memory repeated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longstride import kernels

from .compare import assert_same, leaf
from .native import assert_close, needs_triton, triton_chosen


def negative(*shape: int, seed: int = 9) -> Tensor:
    return (-leaf(*shape, seed=seed).detach().abs() - 0.01).requires_grad_()


def sequences(count: int, *shape: int) -> list[Tensor]:
    return [leaf(*shape, seed=seed) for seed in range(count)]


def in_stages(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, entering: Tensor) -> Tensor:
    stages = kernels.begin_state_space_dual(x, log_decay, B, C)
    stages.compute_local()
    return stages.finish(entering)


def wkv7_in_stages(r: Tensor, *others: Tensor) -> Tensor:
    *stored, entering = others
    stages = kernels.begin_wkv7(*stored)
    stages.compute_local(r)
    return stages.finish(entering)


ROWS = kernels.RowMap.of(torch.tensor([3, 0, 2, 1]), torch.tensor([0, 0, 2, 3]), 5)
COUNTS, TARGETS = torch.tensor([3, 0, 5]), torch.tensor([1, 0, -100, 3, 2])
# operation, inputs
DOORS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "attention": (kernels.attention, sequences(3, 2, 7, 2, 4)),
    "gated_linear_attention": (
        kernels.gated_linear_attention,
        [*sequences(3, 2, 7, 2, 3), negative(2, 7, 2, 3)],
    ),
    "gather_rows": (lambda x: kernels.gather_rows(x, ROWS), [leaf(5, 6)]),
    "grouped_matmul": (lambda x, w: kernels.grouped_matmul(x, w, COUNTS), [leaf(8, 4), leaf(3, 4, 6)]),
    "linear_cross_entropy": (
        lambda h, w, b: kernels.linear_cross_entropy(h, w, TARGETS, bias=b, chunk_size=3).unsqueeze(0),
        [leaf(5, 3), leaf(7, 3), leaf(7)],
    ),
    "long_convolution": (kernels.long_convolution, [leaf(2, 9, 3), leaf(3, 9)]),
    "modal_convolution": (kernels.modal_convolution, [leaf(2, 9, 3), negative(3, 2), leaf(3, 2)]),
    "rms_norm": (lambda x, w, g: kernels.rms_norm(x, w, gate=g), [leaf(2, 5, 6), leaf(6), leaf(2, 5, 6, seed=1)]),
    "rotary": (lambda x: kernels.rotary(x, torch.arange(5)), [leaf(2, 5, 3, 4)]),
    "selective_scan": (
        kernels.selective_scan,
        [leaf(2, 7, 3), (-negative(2, 7, 3).detach()).requires_grad_(), negative(3, 2), *sequences(2, 2, 7, 2)],
    ),
    "short_convolution": (kernels.short_convolution, [leaf(2, 9, 3), leaf(3, 4)]),
    "medium convolution": (kernels.short_convolution, [leaf(2, 9, 3), leaf(3, 18)]),
    "state_space_dual": (
        kernels.state_space_dual,
        [leaf(2, 7, 2, 3), negative(2, 7, 2), *sequences(2, 2, 7, 1, 2)],
    ),
    "state_space_dual in stages": (
        in_stages,
        [leaf(2, 7, 2, 3), negative(2, 7, 2), *sequences(2, 2, 7, 1, 2), leaf(2, 2, 3, 2)],
    ),
    "sum_rows": (lambda x, w, y: kernels.sum_rows(x, ROWS, w, y), [leaf(4, 6), leaf(4), leaf(5, 6)]),
    "swiglu": (kernels.swiglu, sequences(2, 2, 5, 6)),
    "wkv4": (kernels.wkv4, [*sequences(2, 2, 7, 3), negative(3), leaf(3)]),
    "wkv4_state": (kernels.wkv4_state, [*sequences(2, 2, 7, 3), negative(3)]),
    "wkv7": (kernels.wkv7, [leaf(2, 7, 1, 3), negative(2, 7, 1, 3), *sequences(4, 2, 7, 1, 3)]),
    "wkv7 in stages": (
        wkv7_in_stages,
        [leaf(2, 7, 1, 3), negative(2, 7, 1, 3), *sequences(4, 2, 7, 1, 3), leaf(2, 1, 3, 3)],
    ),
}


def call(function: Callable[..., Any], *inputs: Tensor, dense: bool) -> Tensor:
    """The sum over the first dimension. Not dense: gradients arrive expanded, inputs lie with dimensions swapped."""
    if not dense:
        inputs = tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x for x in inputs)
    result = function(*inputs)
    y = result if isinstance(result, Tensor) else result[0]
    if dense:
        y.register_hook(Tensor.contiguous)
    return y.sum(0, keepdim=True)


@pytest.mark.parametrize("name", DOORS)
def test_layouts_do_not_matter(name: str) -> None:
    function, inputs = DOORS[name]
    assert_same(partial(call, function, dense=False), partial(call, function, dense=True), inputs)


@needs_triton
@pytest.mark.parametrize("name", sorted(set(DOORS) - {"attention", "grouped_matmul", "rotary"}))
def test_layouts_do_not_matter_to_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the portable code in double precision, where there is any other; rotary has a test of its own."""
    function, inputs = DOORS[name]

    def portable(*x: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(kernels.triton_support, "takes", lambda *tensors: False)
            return call(function, *x, dense=True)

    with triton_chosen(monkeypatch) as launched:
        assert_close(partial(call, function, dense=False), portable, inputs)
    assert launched
