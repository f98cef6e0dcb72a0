"""Rows to their experts and back: portable code and Triton kernels against sums row by row in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import RowMap, gather_rows, permute, sum_rows
from longstride.kernels.experts.reference import gather_rows_reference, sum_rows_reference

from .compare import assert_same, leaf, worst_error
from .native import DEVICE, NATIVE, assert_close, needs_triton, triton_chosen

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, choices, experts, width, whether some choices are elsewhere
SIZES = [(1, 1, 1, 1, False), (9, 2, 5, 21, False), (7, 4, 6, 16, True), (6, 1, 3, 3, True)]
if NATIVE:
    SIZES += [(3000, 8, 64, 1500, True), (1000, 2, 8, 4096, False)]


def rows_of(tokens: int, choices: int, experts: int, some_elsewhere: bool) -> RowMap:
    """Of choices drawn at random; the last token, and with `some_elsewhere` every third choice, has no row here."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(2))
    index = scores.topk(min(choices, experts)).indices
    if not some_elsewhere:
        return RowMap.of_sorted(permute(index, experts)[0], index.shape[1])
    here = torch.arange(index.numel()) % 3 > 0
    here[-index.shape[1] :] = False
    places = here.nonzero().flatten()
    return RowMap.of(permute(index.flatten()[places], experts)[0], places // index.shape[1], tokens)


def on(device: torch.device, rows: RowMap) -> RowMap:
    return RowMap(*(getattr(rows, name).to(device) for name in RowMap.__dataclass_fields__))


def gather(rows: RowMap) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return partial(gather_rows, rows=on(DEVICE, rows)), partial(gather_rows_reference, token_M=rows.token_M)


def summed(rows: RowMap) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """With weights and onto something, or without, as the arguments are."""

    def fast(values: Tensor, *more: Tensor) -> Tensor:
        return sum_rows(values, on(values.device, rows), *more)

    def slow(values: Tensor, *more: Tensor) -> Tensor:
        weight = more[0][rows.choice_M] if more else None
        return sum_rows_reference(values, rows.token_M, rows.num_tokens, weight, *more[1:])

    return fast, slow


def sum_inputs(rows: RowMap, width: int, weighted: bool) -> list[Tensor]:
    values = leaf(rows.num_rows, width, seed=1)
    return [values, leaf(rows.num_rows, seed=2), leaf(rows.num_tokens, width, seed=3)] if weighted else [values]


@pytest.mark.parametrize(("tokens", "choices", "experts", "width", "some"), SIZES)
def test_a_map_and_its_inverse(tokens: int, choices: int, experts: int, width: int, some: bool) -> None:
    rows = rows_of(tokens, choices, experts, some)
    for token in range(tokens):
        mine = rows.row_C[rows.start_N[token] : rows.start_N[token + 1]]
        assert (rows.token_M[mine] == token).all()
        assert (rows.token_C[rows.start_N[token] : rows.start_N[token + 1]] == token).all()
    assert torch.equal(rows.row_C[rows.choice_M], torch.arange(rows.num_rows))


def test_numbers_of_experts_may_be_of_one_byte() -> None:
    index = torch.rand(50, 7, generator=torch.Generator().manual_seed(2)).topk(3).indices
    for short, long in zip(permute(index.to(torch.uint8), 7), permute(index, 7), strict=True):
        assert short.dtype == long.dtype == torch.int64 and torch.equal(short, long)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "choices", "experts", "width", "some"), SIZES)
def test_portable_code(tokens: int, choices: int, experts: int, width: int, some: bool, weighted: bool) -> None:
    rows = rows_of(tokens, choices, experts, some)
    assert_same(partial(gather_rows, rows=rows), gather(rows)[1], [leaf(tokens, width)])
    fast, slow = summed(rows)
    inputs = sum_inputs(rows, width, weighted)
    assert_same(fast, slow, inputs)
    if not NATIVE:
        assert not rows.num_rows or torch.autograd.gradcheck(fast, tuple(inputs))
    if tokens > 1:  # negative control: another's rows
        wrong = replace(rows, row_C=rows.row_C.roll(1))
        assert worst_error(summed(wrong)[0], slow, inputs) > 1e-3


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "choices", "experts", "width", "some"), SIZES)
def test_gather(
    tokens: int, choices: int, experts: int, width: int, some: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tokens, choices, experts, some)
    if not rows.num_rows:
        return
    with triton_chosen(monkeypatch) as launched:
        assert_close(*gather(rows), [leaf(tokens, width)], dtype)
    assert launched == ["gather_kernel", "sum_kernel"]


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tokens", "choices", "experts", "width", "some"), SIZES)
def test_sum(
    tokens: int,
    choices: int,
    experts: int,
    width: int,
    some: bool,
    weighted: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_of(tokens, choices, experts, some)
    if not rows.num_rows:
        return
    with triton_chosen(monkeypatch) as launched:
        assert_close(*summed(rows), sum_inputs(rows, width, weighted), dtype)
    assert launched == ["sum_kernel", "sum_gradient_kernel" if weighted else "gather_kernel"]


@needs_triton
def test_half_types_are_summed_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 ones: in bfloat16 a sum would stay at 256."""
    one = on(DEVICE, RowMap.of(torch.arange(300), torch.zeros(300, dtype=torch.int64), 1))
    ones = torch.ones(300, 4, dtype=torch.bfloat16, device=DEVICE)
    assert (sum_rows(ones, one) == 300).all()
    with triton_chosen(monkeypatch):
        assert (sum_rows(ones, one) == 300).all()


def test_wrong_arguments_are_named() -> None:
    rows = rows_of(9, 2, 5, False)
    with pytest.raises(ValueError, match="8 tokens, but the map is for 9"):
        gather_rows(torch.zeros(8, 2), rows)
    with pytest.raises(ValueError, match="17 rows, but the map is for 18"):
        sum_rows(torch.zeros(17, 2), rows)
    with pytest.raises(ValueError, match=r"weights \(9,\) torch.float32; expected \(18,\) torch.float32"):
        sum_rows(torch.zeros(18, 2), rows, torch.ones(9))
    with pytest.raises(ValueError, match=r"onto \(9, 2\) torch.float64; expected \(9, 2\) torch.float32"):
        sum_rows(torch.zeros(18, 2), rows, torch.ones(18), torch.zeros(9, 2, dtype=torch.float64))
