"""The Triton kernels of RWKV-4 and RWKV-7 against their step loops in float64: outputs and every gradient."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longstride.kernels.wkv4 import EMPTY, wkv4, wkv4_state
from longstride.kernels.wkv4.reference import wkv4_reference

from .compare import relative_error, start_mask
from .native import BFLOAT16_BOUND, DEVICE, FLOAT32_BOUND, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_wkv4 import arguments as arguments4
from .test_wkv4 import full as full4
from .test_wkv7 import WHOLE_AND_STAGED as WHOLE_AND_STAGED7
from .test_wkv7 import arguments as arguments7

pytestmark = needs_triton


@pytest.mark.parametrize("keys", [2.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 11, 3), (1, 8, 20), *([(2, 1000, 100)] if NATIVE else [])])
def test_wkv4_equals_the_step_loop(shape: tuple[int, int, int], keys: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of any size: numerator and denominator share an exponent, which single precision rounds at every token.

    Over a thousand tokens the step loop in single precision is off by more than FLOAT32_BOUND itself.
    """
    fast, slow, inputs = partial(full4, wkv4), partial(full4, wkv4_reference), arguments4(*shape, keys=keys)
    with triton_chosen(monkeypatch) as launched:
        found = errors(fast, slow, inputs, torch.float32)
    loop = errors(slow, slow, inputs, torch.float32)
    assert all(error < max(FLOAT32_BOUND, 3 * alike) for error, alike in zip(found, loop, strict=True)), (found, loop)
    assert launched == ["wkv4_kernel", "wkv4_gradient_kernel"]


@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (3, 4, 5)), (1, (1, 8, 10))])
def test_wkv4_documents(rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(rows, 11, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments4(2, 11, 3)
    slow = partial(full4, wkv4_reference, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(full4, wkv4, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(partial(full4, wkv4), slow, inputs, torch.float32)) > 1e-3  # negative control


@pytest.mark.parametrize("shape", [(1, 9, 3), *([(2, 1000, 100)] if NATIVE else [])])
def test_wkv4_in_bfloat16(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, states and all gradients; then outputs from nothing."""
    with triton_chosen(monkeypatch):
        assert_close(partial(full4, wkv4), partial(full4, wkv4_reference), arguments4(*shape), torch.bfloat16)
        assert_close(lambda *x: wkv4(*x)[0], lambda *x: wkv4_reference(*x)[0], arguments4(*shape)[:4], torch.bfloat16)
    assert EMPTY[2] > torch.finfo(torch.float32).min


def last_state(k: Tensor, v: Tensor, log_decay: Tensor, **options) -> Tensor:
    return wkv4_reference(k, v, log_decay, torch.zeros_like(log_decay), **options)[1]


@pytest.mark.parametrize(("keys", "dtype"), [(2.0, torch.float32), (30.0, torch.float32), (2.0, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 11, 3), (1, 33, 20), *([(2, 3000, 100)] if NATIVE else [])])
def test_wkv4_state_is_the_last_of_the_step_loop(
    shape: tuple[int, int, int], keys: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exponent too, and the gradient of the key that set it; no worse than the step loop in the same precision."""
    inputs = arguments4(*shape, keys=keys)[:3]
    with triton_chosen(monkeypatch) as launched:
        found = errors(wkv4_state, last_state, inputs, dtype)
    loop = errors(last_state, last_state, inputs, dtype)
    bound = FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND
    assert all(error < max(bound, 3 * alike) for error, alike in zip(found, loop, strict=True)), (found, loop)
    assert launched == ["wkv4_state_kernel", "wkv4_state_gradient_kernel"]


@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (3, 4, 5)), (1, (1, 8, 18)), (2, (7, 20))])
def test_wkv4_state_of_the_last_document(
    rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole segments lie before it."""
    starts = start_mask(rows, 21, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs, slow = arguments4(2, 21, 3)[:3], partial(last_state, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(wkv4_state, document_starts=starts.to(DEVICE)), slow, inputs)
        assert positions == (0,) or max(errors(wkv4_state, slow, inputs, torch.float32)) > 1e-3  # negative control


CHUNKS7 = ["systems_kernel", "transition_kernel", "pass_kernel", "output_kernel"]
STATES7 = ["transition_kernel", "pass_kernel", "state_gradient_kernel", "pair_gradient_kernel"]
LAUNCHED7 = {
    "whole": [*CHUNKS7, "systems_kernel", "output_gradient_kernel", *STATES7],
    "staged": [*CHUNKS7, "output_gradient_kernel", *STATES7],
}
both_ways7 = pytest.mark.parametrize("way", WHOLE_AND_STAGED7)
SINGLE, HALF = torch.float32, torch.bfloat16


@both_ways7
@pytest.mark.parametrize(
    ("shape", "decay", "dtype"),
    [
        ((1, 1, 1, 1), 0.606, SINGLE), ((1, 7, 2, 3), 0.606, SINGLE), ((1, 19, 1, 18), 0.606, SINGLE),
        ((1, 19, 1, 3), 0.606, HALF), ((1, 19, 1, 3), 8.0, SINGLE),
        *([((1, 500, 3, 64), 0.606, SINGLE), ((1, 500, 3, 64), 0.606, HALF), ((2, 100, 2, 64), 8.0, SINGLE)] * NATIVE),
    ],
)  # fmt: skip
def test_wkv7_equals_the_step_loop(
    way: str, shape: tuple[int, int, int, int], decay: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with decays of which no chunk's product could be divided by."""
    with triton_chosen(monkeypatch) as launched:
        assert_close(*WHOLE_AND_STAGED7[way], arguments7(*shape, decay=decay), dtype)
    assert launched == LAUNCHED7[way]


@both_ways7
@pytest.mark.parametrize(("rows", "positions"), [(1, (0, 15, 16)), (2, (3, 4, 17))])
def test_wkv7_documents(way: str, rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(rows, 18, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs, (fast, slow) = arguments7(rows, 18, 1, 3), WHOLE_AND_STAGED7[way]
    slow = partial(slow, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(fast, document_starts=starts.to(DEVICE)), slow, inputs)
        single = [x.detach().to(DEVICE, torch.float32) for x in inputs]
        blind = zip(fast(*single), slow(*(x.detach() for x in inputs)), strict=True)
        assert max(relative_error(value.cpu(), want) for value, want in blind) > 1e-3  # negative control


@both_ways7
def test_wkv7_passes_states_through_pieces_of_the_chunks(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most exists for a piece of the chunks at a time: here for one."""
    from longstride.kernels.wkv7 import triton_wkv7

    monkeypatch.setattr(triton_wkv7, "segment_tokens", lambda chunk, *_: chunk)
    with triton_chosen(monkeypatch) as launched:
        assert_close(*WHOLE_AND_STAGED7[way], arguments7(1, 70 if NATIVE else 35, 1, 2))
    assert launched.count("pass_kernel") == launched.count("transition_kernel") == 6
    assert launched.count("output_gradient_kernel") == {"whole": 3, "staged": 1}[way]


@pytest.mark.parametrize("output", [0, 1])
def test_wkv7_stages_with_one_output_alone(output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of y, or of what leaves: gradients that another would add to do not come."""
    fast, slow = WHOLE_AND_STAGED7["staged"]
    with triton_chosen(monkeypatch):
        assert_close(lambda *x: fast(*x)[output], lambda *x: slow(*x)[output], arguments7(1, 5, 1, 2))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the numbers of a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@both_ways7
def test_wkv7_does_not_wait_for_the_gpu(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in arguments7(1, 5, 1, 2)]
    door = partial(WHOLE_AND_STAGED7[way][0], document_starts=start_mask(1, 5, (0, 2)).to(DEVICE))
    with triton_chosen(monkeypatch), Waits() as waits:
        outputs = door(*inputs)
        torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
    assert waits.count == 0
    with Waits() as waits:
        door(*(x.detach().double() for x in inputs))
    assert waits.count > 0  # negative control: PyTorch looks at the decays


def test_wkv7_keeps_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the arguments a state for each chunk; in stages two, with two triangular matrices, and y and z."""
    batch, length, heads, width, chunk = 1, 40, 1, 8, 32 if NATIVE else 16
    inputs = [x.detach().to(DEVICE, torch.float32).requires_grad_() for x in arguments7(batch, length, heads, width)]
    chunks = -(-length // chunk)
    states, triangles = (chunks + 1) * width * width, 2 * chunks * chunk * chunk
    allowed = {"whole": states, "staged": 2 * states + triangles + 2 * length * width + 2 * width * width}
    for way, (fast, _) in WHOLE_AND_STAGED7.items():
        kept: dict[int, int] = {}

        def note(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
            return x

        with triton_chosen(monkeypatch), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            fast(*inputs)
        arguments = sum(x.numel() for x in inputs)
        assert sum(x.numel() for x in inputs[:6]) < sum(kept.values()) <= arguments + allowed[way]
