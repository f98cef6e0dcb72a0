"""Offsets above 2^31 elements: tokens that lie far apart in memory here, tensors of that size on a GPU.

Inputs whose tokens are 2^30 elements from each other, and gradients that arrive so, reach the kernels as they lie: few
pages of them exist. Every element that a 32-bit offset would misplace belongs to another page or to none. Kernels that
ask for dense copies (the Toeplitz products), or read what a matrix product wrote (the loss), cannot be tested
so; for those, and for offsets of outputs, the compiled code is searched for 32-bit products (test_triton_compiles.py)
and whole tensors are used where a GPU is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longstride import kernels
from longstride.kernels import triton_support
from longstride.kernels.experts.reference import gather_rows_reference, sum_rows_reference
from longstride.kernels.long_convolution.reference import long_convolution_reference
from longstride.kernels.norms.reference import rms_norm_reference
from longstride.kernels.rotary.reference import rotary_reference
from longstride.kernels.short_convolution.reference import short_convolution_reference
from longstride.kernels.swiglu.reference import swiglu_reference

from . import test_triton_readouts as readouts
from .compare import leaf, relative_error
from .native import BFLOAT16_BOUND, DEVICE, FLOAT32_BOUND, NATIVE, needs_triton, on_gpu, triton_chosen
from .test_convolutions import gated as convolution_full
from .test_convolutions import gated_arguments as convolution_arguments
from .test_gated_linear_attention import arguments as gated_arguments
from .test_gated_linear_attention import full as gated_full
from .test_modal_convolution import arguments as modal_arguments
from .test_modal_convolution import full as modal_full
from .test_selective_scan import arguments as scan_arguments
from .test_selective_scan import full as scan_full
from .test_state_space_dual import arguments as dual_arguments
from .test_state_space_dual import full as dual_full
from .test_triton_recurrences import last_state
from .test_wkv4 import arguments as wkv4_arguments
from .test_wkv4 import full as wkv4_full
from .test_wkv7 import arguments as wkv7_arguments
from .test_wkv7 import full as wkv7_full

# one process at a time: on a GPU these take gigabytes
pytestmark = [needs_triton, pytest.mark.xdist_group("memory")]
FAR, TOKENS = 1 << 30, 3


def far_apart(x: Tensor, *, room_before: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of x (1, 3, ...) with FAR elements between tokens; `room_before`: as many elements in front."""
    before = 2 * FAR if room_before else 0
    storage = torch.empty(before + 2 * FAR + x[0, 0].numel(), dtype=dtype, device=DEVICE)
    strides = (3 * FAR, FAR, *x[0, 0].contiguous().stride())
    return storage.as_strided(x.shape, strides, before).copy_(x.detach())


def pair(module: str, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An operation's door and reference."""
    reference = __import__(f"longstride.kernels.{module}.reference", fromlist=[name])
    return getattr(kernels, name), getattr(reference, f"{name}_reference")


def plain(function: Callable[..., Any], *inputs: Tensor) -> Any:
    return function(*inputs)


def norm(function: Callable[..., Any], x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return function(x, weight, gate=gate)


def turn(function: Callable[..., Any], x: Tensor) -> Tensor:
    return function(x, torch.arange(TOKENS, device=x.device))


ROWS = kernels.RowMap.of(torch.tensor([2, 0, 1]), torch.tensor([0, 2, 2]), TOKENS)


def on(device: torch.device) -> kernels.RowMap:
    return kernels.RowMap(*(x.to(device) for x in vars(ROWS).values()))


def gathered(function: Callable[..., Any], x: Tensor) -> Tensor:
    rows = on(x.device)
    return function(x[0], rows if function is kernels.gather_rows else rows.token_M).unsqueeze(0)


def summed(function: Callable[..., Any], values: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    rows = on(values.device)
    if function is kernels.sum_rows:
        return function(values[0], rows, weight, onto[0]).unsqueeze(0)
    return function(values[0], rows.token_M, TOKENS, weight[rows.choice_M], onto[0]).unsqueeze(0)


def modal_read(function: Callable[..., Any], *inputs: Tensor) -> Tensor:
    return function(*inputs, length=TOKENS)


def first_sequence(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach()[:1] if x.dim() > 2 else x.detach() for x in inputs]


# door and reference, how they are called, inputs, those that kernels read as they lie
CASES: dict[str, tuple[tuple[Callable[..., Any], Callable[..., Any]], Callable[..., Any], list[Tensor], tuple]] = {
    "scan": (pair("selective_scan", "selective_scan"), scan_full, scan_arguments(1, TOKENS, 2, 2), (0, 1, 3, 4, 6)),
    "dual": (
        pair("state_space_dual", "state_space_dual"), dual_full, dual_arguments(1, TOKENS, 2, 3, 1, 2), (0, 2, 3),
    ),
    "gated": (
        pair("gated_linear_attention", "gated_linear_attention"), gated_full,
        gated_arguments(1, TOKENS, 2, 3, 2), (0, 1, 2, 3),
    ),
    "modal": (
        pair("modal_convolution", "modal_convolution"), modal_full, modal_arguments(1, TOKENS, 3, 2, True), (0,),
    ),
    "wkv4 state": ((kernels.wkv4_state, last_state), plain, wkv4_arguments(1, TOKENS, 3)[:3], (0, 1)),
    "wkv4": (pair("wkv4", "wkv4"), wkv4_full, wkv4_arguments(1, TOKENS, 3), (0, 1)),
    "wkv7": (pair("wkv7", "wkv7"), wkv7_full, wkv7_arguments(1, TOKENS, 2, 3), (0, 1, 2, 3, 4, 5)),
    "scan stages": (
        readouts.CASES["scan"][:2], plain, first_sequence(readouts.scan_inputs(TOKENS, 0.05)), (1, 3, 4, 5),
    ),
    "dual read-out": (readouts.CASES["dual"][:2], plain, first_sequence(readouts.dual_inputs(TOKENS, 0.05)), (2,)),
    "gated read-out": (readouts.CASES["gated"][:2], plain, first_sequence(readouts.gated_inputs(TOKENS, 0.05)), (1,)),
    "modal read-out": (
        readouts.CASES["modal"][:2], modal_read,
        first_sequence(readouts.modal_inputs(TOKENS, 0.05, turning=True)), (),
    ),
    "short convolution": (
        (kernels.short_convolution, short_convolution_reference), plain,
        [leaf(1, TOKENS, 5), leaf(5, 3)], (0,),
    ),
    "long convolution": (
        (kernels.long_convolution, long_convolution_reference), convolution_full,
        convolution_arguments(1, TOKENS, 5, 3), (0, 3, 4),
    ),
    "norm": (
        (kernels.rms_norm, rms_norm_reference), norm, [leaf(1, TOKENS, 6), leaf(6), leaf(1, TOKENS, 6, seed=1)], (0, 2),
    ),
    "expert rows": ((kernels.gather_rows, gather_rows_reference), gathered, [leaf(1, TOKENS, 6)], (0,)),
    "expert sums": (
        (kernels.sum_rows, sum_rows_reference), summed,
        [leaf(1, TOKENS, 6), leaf(TOKENS), leaf(1, TOKENS, 6, seed=1)], (0, 2),
    ),
    "rotary": ((kernels.rotary, rotary_reference), turn, [leaf(1, TOKENS, 2, 4)], (0,)),
    "swiglu": (
        (kernels.swiglu, swiglu_reference), plain, [leaf(1, TOKENS, 6), leaf(1, TOKENS, 6, seed=1)], (0, 1),
    ),
}  # fmt: skip
WITHOUT_OUTPUTS = ("wkv4 state",)  # what they give has no tokens
RUNS = [(case, which) for case, (*_, far) in CASES.items() for which in far or (None,)]


def results(function: Callable[..., Any], inputs: Sequence[Tensor], grad_y: Tensor) -> list[Tensor]:
    """Outputs, and the gradients for `grad_y` and, where a final state comes out, ones."""
    result = function(*inputs)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    grads = [grad_y, *(torch.ones_like(x) for x in outputs[1:])]
    return outputs + list(torch.autograd.grad(outputs, list(inputs), grads))


@pytest.mark.parametrize(("case", "which"), RUNS)
def test_tokens_far_apart(case: str, which: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients, with one input and the gradient of y far apart."""
    (door, reference), call, given, _ = CASES[case]
    exact = [x.detach().requires_grad_() for x in given]
    result = call(reference, *exact)
    grad_y = leaf(*(result if isinstance(result, Tensor) else result[0]).shape, seed=9).detach()
    expected = results(partial(call, reference), exact, grad_y)
    inputs = [x.detach().to(DEVICE, torch.complex64 if x.is_complex() else torch.float32) for x in given]
    far = [] if case in WITHOUT_OUTPUTS else [far_apart(grad_y)]
    grad_y = far[0] if far else grad_y.to(DEVICE, torch.float32)
    if which is not None:
        far.append(far_apart(inputs[which]))
        inputs[which] = far[-1]
    read: set[int] = set()
    with triton_chosen(monkeypatch), monkeypatch.context() as patch:
        launch = triton_support.launch

        def watched(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
            read.update(x.data_ptr() for x in args if isinstance(x, Tensor))
            launch(kernel, grid, *args, **options)

        patch.setattr(triton_support, "launch", watched)
        found = results(partial(call, door), [x.requires_grad_() for x in inputs], grad_y)
    assert read >= {x.data_ptr() for x in far}, "a kernel was given a dense copy"
    for value, want in zip(found, expected, strict=True):
        assert relative_error(value.cpu(), want) < FLOAT32_BOUND


def test_a_32_bit_offset_would_be_noticed() -> None:
    """Negative control: the third row is read from as far in front as it lies behind."""
    from .narrow_offsets import narrow_kernel

    x = leaf(1, TOKENS, 6).detach().bfloat16()
    far, y = far_apart(x, room_before=True, dtype=torch.bfloat16), torch.zeros(TOKENS, 6, dtype=torch.bfloat16)
    y = y.to(DEVICE)
    triton_support.launch(narrow_kernel, (TOKENS,), far, y, far.stride(1), 6, BLOCK=8)
    assert torch.equal(y[:2].cpu(), x[0, :2]) and not torch.equal(y[2].cpu(), x[0, 2])


def memory_of_gpu() -> float:
    return torch.cuda.get_device_properties(DEVICE).total_memory / 2**30 if NATIVE else 0.0


def scan(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, starts: Tensor | None) -> Tensor:
    rates = -torch.arange(1.0, 17.0, device=u.device).repeat(u.shape[2], 1)
    return kernels.selective_scan(u, delta, rates, B, C, delta_softplus=True, document_starts=starts)[0]


def gated_norm(x: Tensor, gate: Tensor, starts: Tensor | None) -> Tensor:
    return kernels.rms_norm(x, torch.ones(x.shape[2], device=x.device), gate=gate)


def rwkv7(x: Tensor, log_w: Tensor, direction: Tensor, starts: Tensor | None) -> Tensor:
    """Each tensor in several places, so that all of it fits on one GPU."""
    return kernels.wkv7(x, -log_w.abs(), x, x, direction, direction, document_starts=starts)[0]


def there_and_back(x: Tensor, starts: Tensor | None) -> Tensor:
    """Every token's row in reversed order, and back with a weight."""
    rows = kernels.RowMap.of_sorted(torch.arange(x.shape[1], device=x.device).flip(0), 1)
    weight = torch.full((x.shape[1],), 0.5, dtype=x.dtype, device=x.device)
    return kernels.sum_rows(kernels.gather_rows(x[0], rows), rows, weight).unsqueeze(0)


TAIL = 300
# what takes sequences and where documents begin, sizes of the sequences: the first has 2^31 elements and some more
LARGE: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "scan": (scan, [(1, (1 << 20) + TAIL, width) for width in (2048, 2048, 16, 16)]),
    "norm": (gated_norm, [(1, (1 << 19) + TAIL, 4096)] * 2),
    "expert rows": (there_and_back, [(1, (1 << 19) + TAIL, 4096)]),
    "swiglu": (lambda gate, up, starts: kernels.swiglu(gate, up), [(1, (1 << 19) + TAIL, 4096)] * 2),
    "wkv7": (rwkv7, [(1, (1 << 17) + TAIL, 1024, 16)] * 3),
}


@on_gpu
@pytest.mark.skipif(memory_of_gpu() < 75, reason="needs a GPU with 75 GiB of memory")
@pytest.mark.parametrize("operation", LARGE)
def test_last_tokens_of_more_than_two_to_the_31_elements(operation: str) -> None:
    """A document begins TAIL tokens before the end: what follows, and its gradients, equal a run on these tokens."""
    function, shapes = LARGE[operation]
    assert shapes[0][1] * shapes[0][2] * (shapes[0] + (1,))[3] > 1 << 31
    sequences = [(torch.randn(x, device=DEVICE, dtype=torch.bfloat16) * 0.2).requires_grad_() for x in shapes]
    starts = torch.zeros(1, shapes[0][1], dtype=torch.bool, device=DEVICE)
    starts[0, -TAIL] = True
    y = function(*sequences, starts)
    grad_y = torch.randn_like(y)
    kept = [x[:, -TAIL:].clone() for x in (y, *torch.autograd.grad(y, sequences, grad_y))]
    tails = [x.detach()[:, -TAIL:].clone().requires_grad_() for x in sequences]
    y_tail = function(*tails, None)
    expected = (y_tail, *torch.autograd.grad(y_tail, tails, grad_y[:, -TAIL:].clone()))
    for value, want in zip(kept, expected, strict=True):
        assert relative_error(value, want.double()) < BFLOAT16_BOUND


def convolution(u: Tensor, gate: Tensor) -> Tensor:
    """With more taps than Toeplitz products take."""
    taps = torch.sin(torch.arange(300.0, device=u.device)).expand(u.shape[2], -1)
    return kernels.long_convolution(u, taps, input_gate=gate, gate=gate)


def last_wkv4(k: Tensor, v: Tensor) -> Tensor:
    return kernels.wkv4_state(k, v, -torch.ones(k.shape[2], device=k.device)).unsqueeze(1)


# what treats columns (the third dimension) each by itself, sizes of its inputs
COLUMNS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "long convolution": (convolution, (1, (1 << 20) + TAIL, 2048)),
    "wkv4 state": (last_wkv4, (1, (1 << 20) + TAIL, 2048)),
}


@on_gpu
@pytest.mark.skipif(memory_of_gpu() < 75, reason="needs a GPU with 75 GiB of memory")
@pytest.mark.parametrize("operation", COLUMNS)
def test_last_columns_of_more_than_two_to_the_31_elements(operation: str) -> None:
    """Outputs and gradients of the last eight columns equal those without the others."""
    function, shape = COLUMNS[operation]
    inputs = [(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.2).requires_grad_() for _ in range(2)]
    columns = [x.detach()[:, :, -8:].clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    grad_y = torch.randn_like(y)
    kept = [x[:, :, -8:].clone() for x in (y, *torch.autograd.grad(y, inputs, grad_y))]
    want_y = function(*columns)
    expected = (want_y, *torch.autograd.grad(want_y, columns, grad_y[:, :, -8:].clone()))
    for value, want in zip(kept, expected, strict=True):
        assert relative_error(value, want.double()) < BFLOAT16_BOUND


@on_gpu
@pytest.mark.skipif(memory_of_gpu() < 75, reason="needs a GPU with 75 GiB of memory")
def test_logits_of_more_than_two_to_the_31_elements() -> None:
    """All of them in one chunk: gradients of the last tokens equal those without the others."""
    tokens, vocabulary = (1 << 15) + TAIL, 1 << 16
    hidden, weight = (torch.randn(size, 16, device=DEVICE, dtype=torch.bfloat16) for size in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)

    def gradient(hidden: Tensor, targets: Tensor) -> Tensor:
        hidden = hidden.clone().requires_grad_()
        return torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets, chunk_size=tokens), hidden)[0]

    value, want = gradient(hidden, targets)[-TAIL:], gradient(hidden[-TAIL:], targets[-TAIL:])
    assert relative_error(value, want.double()) < BFLOAT16_BOUND
