"""The compiled selective scan against the step loop: outputs and every gradient, in both precisions."""

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longstride.kernels import compiled, selective_scan
from longstride.kernels.selective_scan.compiled import EXTENSION, CompiledSelectiveScan
from longstride.kernels.selective_scan.portable import SelectiveScan
from longstride.kernels.selective_scan.reference import selective_scan_reference

from .compare import assert_same, compiler_is_here, outputs_and_gradients, relative_error, start_mask, worst_error
from .test_selective_scan import arguments, full

needs_compiler = pytest.mark.skipif(not compiler_is_here(), reason="no C++ compiler or no ninja on this machine")


def scan(u, delta, A, B, C, D, z, bias, state, starts=None, softplus=True) -> tuple[Tensor, Tensor]:
    return CompiledSelectiveScan.apply(u, delta, A, B, C, D, z, bias, state, starts, softplus)


SHAPES = [(1, 1, 1, 1), (2, 7, 3, 4), (1, 32, 8, 16), (2, 65, 9, 3), (1, 137, 50, 16), (1, 70, 17, 40)]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softplus", [True, False])
def test_equals_the_step_loop(shape: tuple[int, int, int, int], softplus: bool, threads: int) -> None:
    inputs = arguments(*shape)
    if not softplus:  # step sizes must be positive
        inputs[1] = inputs[1].detach().abs().requires_grad_()
        inputs[7] = inputs[7].detach().abs().requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        reference = partial(full, selective_scan_reference, delta_softplus=softplus)
        assert_same(partial(scan, softplus=softplus), reference, inputs)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1, 2, 3), (31, 32), (64, 65, 66, 90), (99,)])
def test_documents_forget_the_state_before_them(rows: int, positions: tuple[int, ...]) -> None:
    inputs = arguments(2, 100, 9, 4)
    starts = start_mask(rows, 100, *[(index % rows, position) for index, position in enumerate(positions)])
    slow = partial(full, selective_scan_reference, delta_softplus=True, document_starts=starts)
    assert_same(partial(scan, starts=starts), slow, inputs)
    # Negative control: without the mask the result differs far beyond the tolerance.
    assert worst_error(scan, slow, inputs) > 1e-3


@needs_compiler
def test_optional_arguments_may_be_absent() -> None:
    inputs = arguments(2, 50, 9, 3)
    kept = [*inputs[:5], inputs[8]]
    kept[1] = kept[1].detach().abs().requires_grad_()

    def fast(u, delta, A, B, C, state):
        return scan(u, delta, A, B, C, None, None, None, state, softplus=False)

    def slow(u, delta, A, B, C, state):
        return selective_scan_reference(u, delta, A, B, C, initial_state=state)

    assert_same(fast, slow, kept)


@needs_compiler
def test_softplus_and_decays_over_their_whole_range() -> None:
    """Steps from almost nothing to beyond the threshold, decays from one to nothing."""
    inputs = arguments(1, 64, 16, 3)
    inputs[1] = torch.linspace(-60, 40, 64 * 16, dtype=torch.float64).view(1, 64, 16).requires_grad_()
    inputs[2] = (inputs[2].detach() * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)).requires_grad_()
    assert_same(scan, partial(full, selective_scan_reference, delta_softplus=True), inputs)


@needs_compiler
def test_single_precision_beside_the_oracle() -> None:
    """No worse than PyTorch's own code."""
    singles = [x.detach().float().requires_grad_() for x in arguments(2, 500, 20, 16)]
    doubles = [x.detach().double().requires_grad_() for x in singles]
    exact = outputs_and_gradients(partial(full, selective_scan_reference, delta_softplus=True), doubles)
    fast = outputs_and_gradients(scan, singles)
    portable = outputs_and_gradients(lambda *a: SelectiveScan.apply(*a, None, True), singles)
    for x, y, expected in zip(*(outputs + gradients for outputs, gradients in (fast, portable, exact)), strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, expected) < max(1e-6, 2 * relative_error(y, expected))


@needs_compiler
def test_slices_need_no_copies() -> None:
    """Arguments cut out of wider tensors, as projections make them."""
    inputs = arguments(2, 70, 9, 4)

    def cut(*x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((x[0], x[6], x[3], x[4]), -1)
        u, z, B, C = both.split((9, 9, 4, 4), -1)
        return scan(u, x[1], x[2], B, C, x[5], z, x[7], x[8])

    assert_same(cut, partial(full, selective_scan_reference, delta_softplus=True), inputs)


@needs_compiler
def test_the_public_door_chooses_it() -> None:
    inputs = [x.detach().float().requires_grad_() for x in arguments(1, 4096, 64, 16)]
    y, _ = full(selective_scan, *inputs, delta_softplus=True)
    assert type(y.grad_fn).__name__ == "CompiledSelectiveScanBackward"
    small, _ = full(selective_scan, *[x.detach().requires_grad_() for x in arguments(1, 40, 4, 4)], delta_softplus=True)
    assert type(small.grad_fn).__name__ == "SelectiveScanBackward"


def test_without_a_compiler_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(source: Path) -> None:
        raise RuntimeError("no g++ here\nlong explanation")

    monkeypatch.setattr(compiled, "_build", fails)
    monkeypatch.delenv("LONGSTRIDE_COMPILED", raising=False)
    compiled.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert compiled.library(EXTENSION.source) is None
            assert compiled.library(EXTENSION.source) is None
        assert len(caplog.records) == 1
        assert "no g++ here" in caplog.text
        assert "long explanation" not in caplog.text
        inputs = [x.detach().float() for x in arguments(1, 4096, 64, 16)]
        assert torch.isfinite(full(selective_scan, *inputs, delta_softplus=True)[0]).all()
    finally:
        compiled.library.cache_clear()
