"""Every form of the split convolution against one process's sum over lags: values, gradients, bytes; float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longstride.kernels.long_convolution.reference import long_convolution_reference
from longstride.parallel import Filter, FiniteFilter, ModalFilter, SequenceShard, SharedFilter, convolve
from tests.distributed import run_ranks
from tests.parallel.oracles import gathered, local, normal, relative_error

B, D = 2, 5
DOCUMENTS = [[4, 5, 21], [13]]
Bounds = tuple[int, ...] | None


class Implicit:
    """A filter without end: decaying sines whose decay and frequency are parameters."""

    def __init__(self, parameters_D2: Tensor) -> None:
        self.parameters_D2 = parameters_D2

    def __call__(self, lags_K: Tensor, channels: slice) -> Tensor:
        decay, frequency = self.parameters_D2[channels].unsqueeze(-1).unbind(1)
        return torch.exp(-decay.abs() * lags_K / 10) * torch.cos(frequency * lags_K)


def make(kind: str, parameters: Tensor) -> Filter:
    if kind == "implicit":
        return Implicit(parameters)
    if kind == "shared":
        return SharedFilter(Implicit(parameters), shared_flops=1e6)
    if kind == "finite":
        return FiniteFilter(parameters)
    decay, *rest = parameters.unbind(1)
    if kind == "real modes":
        return ModalFilter(-decay.abs() / 5, rest[0])
    return ModalFilter(torch.complex(-decay.abs() / 5, rest[0]), torch.complex(rest[1], rest[2]))


def parameters_of(kind: str) -> Tensor:
    shape = {
        "implicit": (D, 2),
        "shared": (D, 2),
        "finite": (D, 9),
        "real modes": (D, 2, 3),
        "complex modes": (D, 4, 3),
    }[kind]
    return normal(*shape, seed=1).requires_grad_()


class LargestDimension(TorchDispatchMode):
    """Watches every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, *tensor.shape, 0)
        return result


def largest_dimensions(rank: int, world: int, length: int) -> dict[str, int]:
    """By form, forward and backward, of as few channels as the form can have: messages are flat."""
    found = {}
    for form, channels in (("length", 1), ("channels", world)):
        shard = SequenceShard.split(length)
        u = local(normal(1, length, channels), shard)
        parameters = normal(channels, 2, seed=1).requires_grad_()
        with LargestDimension() as watched:
            convolve(u, Implicit(parameters), shard, form=form).sum().backward()
        found[form] = watched.largest
    return found


def test_by_length_no_process_holds_a_row() -> None:
    length = 4096
    for found in run_ranks(largest_dimensions, 8, length):
        assert found["length"] < length
        assert found["channels"] >= length  # the control: a row of each channel here


def split(
    rank: int, world: int, length: int, kind: str, form: str, documents: object, bounds: Bounds = None
) -> tuple[Tensor, ...]:
    shard = SequenceShard.split(length, None, documents, bounds=bounds)
    u = local(normal(B, length, D), shard)
    first, last = (local(x, shard) for x in gates(length))
    parameters, skip = parameters_of(kind), normal(D, seed=2).requires_grad_()
    y = last * convolve(u, make(kind, parameters), shard, skip=skip, input_gate=first, form=form)
    (y * normal(B, length, D, seed=3)[:, shard.start : shard.stop]).sum().backward()
    sent = torch.tensor([row.bytes_sent for row in shard.ledger.by_motion().values()]).sum()
    return y.detach(), u.grad, parameters.grad, skip.grad, sent, first.grad, last.grad  # type: ignore[return-value]


def whole(length: int, kind: str, documents: object) -> tuple[Tensor, ...]:
    u, parameters, skip = normal(B, length, D).requires_grad_(), parameters_of(kind), normal(D, seed=2).requires_grad_()
    taps = make(kind, parameters)(torch.arange(length), slice(0, D))
    mask = SequenceShard.whole(length, documents).start_mask()
    first, last = (x.requires_grad_() for x in gates(length))
    y = long_convolution_reference(u, taps, skip=skip, input_gate=first, gate=last, document_starts=mask)
    (y * normal(B, length, D, seed=3)).sum().backward()
    return y.detach(), u.grad, parameters.grad, skip.grad, first.grad, last.grad  # type: ignore[return-value]


def gates(length: int) -> tuple[Tensor, Tensor]:
    """Before and behind the convolution."""
    return normal(B, length, D, seed=4), normal(B, length, D, seed=5)


CASES = [
    ("real modes", "state"),
    ("complex modes", "auto"),
    ("complex modes", "channels"),
    ("complex modes", "length"),
    ("implicit", "auto"),
    ("implicit", "channels"),
    ("implicit", "length"),
    ("shared", "channels"),
    ("finite", "halo"),
    ("finite", "length"),
    ("finite", "auto"),
]


def split_all(rank: int, world: int) -> list[tuple[Tensor, ...]]:
    """Every case in one set of processes."""
    return [split(rank, world, length, kind, form, documents) for kind, form, length, documents in ALL]


# 26 tokens over 3 or 4 processes: uneven, and shards shorter than the finite filter
ALL = [(*case, length, documents) for case in CASES for length in (26, 32) for documents in (None, DOCUMENTS)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_sum_over_lags(world: int) -> None:
    by_rank = run_ranks(split_all, world)
    for case, results in zip(ALL, zip(*by_rank, strict=True), strict=True):
        kind, _, length, documents = case
        expected = whole(length, kind, documents)
        for found, wanted in ((0, 0), (1, 1), (5, 4), (6, 5)):
            assert relative_error(gathered(r[found] for r in results), expected[wanted]) < 1e-12, case
        for i in (2, 3):
            assert relative_error(sum(r[i] for r in results), expected[i]) < 1e-12, case  # type: ignore[arg-type]


# larger behind smaller and before, a process with one token, a document on two processes of five and on all
UNEVEN = [(0, 3, 4, 20, 23, 26), (0, 16, 17, 18, 19, 26), (0, 1, 2, 4, 8, 26)]


def split_unevenly(rank: int, world: int) -> list[tuple[Tensor, ...]]:
    cases = [(bounds, documents) for bounds in UNEVEN for documents in (None, DOCUMENTS, [[7]])]
    return [split(rank, world, 26, "implicit", "length", documents, bounds) for bounds, documents in cases]


def test_shards_of_any_size_by_length() -> None:
    expected = [whole(26, "implicit", documents) for _ in UNEVEN for documents in (None, DOCUMENTS, [[7]])]
    for results, wanted in zip(zip(*run_ranks(split_unevenly, 5), strict=True), expected, strict=True):
        for found in (0, 1):
            assert relative_error(gathered(r[found] for r in results), wanted[found]) < 1e-12
        for i in (2, 3):
            assert relative_error(sum(r[i] for r in results), wanted[i]) < 1e-12  # type: ignore[arg-type]


def test_negative_control_documents_do_not_leak() -> None:
    leaking = whole(26, "implicit", None)
    results = run_ranks(split, 2, 26, "implicit", "length", DOCUMENTS)
    assert relative_error(gathered(r[0] for r in results), leaking[0]) > 1e-2


def test_bytes_of_each_form() -> None:
    """Forward and backward of 32 tokens over 4 processes, 8 columns, in float64."""
    one_way = 8 * B * 8 * D * 3 // 4  # T x D x (P - 1) / P numbers
    channels = [int(r[4]) for r in run_ranks(split, 4, 32, "implicit", "channels", None)]
    assert sum(channels) == 4 * 2 * 2 * one_way
    shared = [int(r[4]) for r in run_ranks(split, 4, 32, "shared", "channels", None)]
    assert sum(shared) == 4 * 2 * (2 * one_way + one_way // B)
    length = [int(r[4]) for r in run_ranks(split, 4, 32, "implicit", "length", None)]
    # both ways: 8 frequencies of a block of 8 tokens, 2 of them here; once each way the filter goes with the rows
    frequency = 16 * D * (2 * B + 1)
    assert length == [frequency * (6 + 3 * 2)] * 4
    halo = [int(r[4]) for r in run_ranks(split, 4, 32, "finite", "halo", None)]
    for sent in [int(r[4]) for r in run_ranks(split, 2, 32, "complex modes", "state", None)]:
        assert sent == 2 * 8 * B * D * 3 * 2  # both ways, 3 complex modes a channel
    assert halo == [8 * B * 8 * D, 2 * 8 * B * 8 * D, 2 * 8 * B * 8 * D, 8 * B * 8 * D]


def test_bad_forms_are_named() -> None:
    shard = SequenceShard.whole(8)
    with pytest.raises(
        ValueError, match="unknown convolution form 'magic': choose auto, channels, length, halo, state"
    ):
        convolve(normal(1, 8, D), make("implicit", parameters_of("implicit")), shard, form="magic")
    with pytest.raises(ValueError, match="needs a finite filter"):
        convolve(normal(1, 8, D), make("implicit", parameters_of("implicit")), shard, form="halo")
