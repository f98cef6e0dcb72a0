"""Half types on a GPU go to PyTorch's flash attention. Without one its place is taken by a stand-in as exacting."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels import attention
from longstride.kernels.attention import blockwise, flash
from longstride.kernels.attention.reference import attention_reference

from .compare import leaf, relative_error
from .native import BFLOAT16_BOUND, DEVICE, errors, on_gpu
from .test_attention import finite

FORWARD = "_scaled_dot_product_flash_attention"


def check_read(*tensors: Tensor) -> None:
    assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in tensors)


def forward(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, *, scale: float) -> tuple[object, ...]:
    check_read(q, k, v)
    assert dropout == 0
    out, lse = blockwise.tile_forward(q, k, v, causal, scale)
    return out, lse, None, None, q.shape[2], k.shape[2], torch.empty(2, dtype=torch.uint64), None, None


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: object, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_read(grad, q, k, v, out)
    assert lse.is_contiguous(), "the kernel would read other queries' log-sum-exps"
    assert rest[:5] == (None, None, q.shape[2], k.shape[2], 0.0)
    return blockwise.tile_backward(grad, q, k, v, out, lse, bool(rest[5]), scale)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [5, 8, 17])
def test_what_the_library_is_given(monkeypatch: pytest.MonkeyPatch, causal: bool, dim: int) -> None:
    """Aligned heads and a dense log-sum-exp; the tile comes out as it does by plain products."""
    monkeypatch.setattr(torch.ops.aten, FORWARD, forward)
    monkeypatch.setattr(torch.ops.aten, f"{FORWARD}_backward", backward)
    q, k, v = (leaf(2, n, h, dim, seed=n + h).detach() for n, h in ((19, 4), (19 if causal else 30, 2), (19, 2)))
    v = k.cos() if v.shape != k.shape else v
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    results = flash.tile_forward(q, k, v, causal, 0.3)
    expected = blockwise.tile_forward(q, k, v, causal, 0.3)
    lse = results[1].transpose(1, 2).contiguous().transpose(1, 2)  # as it lies beside the queries
    results += flash.tile_backward(results[0].sin(), q, k, v, results[0], lse, causal, 0.3)
    expected += blockwise.tile_backward(expected[0].sin(), q, k, v, *expected, causal, 0.3)
    assert max(relative_error(a, b) for a, b in zip(results, expected, strict=True)) < 1e-14
    with pytest.raises(AssertionError):  # as it would be read without care
        backward(results[0], q, k, v, results[0], lse, None, None, 19, k.shape[2], 0.0, causal, scale=0.3)


def test_its_arguments_are_in_the_librarys_order() -> None:
    """The library's own declarations, which newer versions of it might change."""
    names = [argument.name for argument in getattr(torch.ops.aten, FORWARD).default._schema.arguments]
    assert names[:5] == ["query", "key", "value", "dropout_p", "is_causal"]
    names = [argument.name for argument in getattr(torch.ops.aten, f"{FORWARD}_backward").default._schema.arguments]
    assert names[:6] == ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert names[8:14] == ["max_q", "max_k", "dropout_p", "is_causal", "philox_seed", "philox_offset"]


def test_only_half_types_on_a_gpu() -> None:
    assert not flash.takes(torch.empty(1, 2, 3, 8, dtype=torch.bfloat16))


@on_gpu
@pytest.mark.parametrize("dim", [64, 20, 256])
@pytest.mark.parametrize("offset", [0, 70])
def test_native_half_types_equal_all_scores(dim: int, offset: int) -> None:
    assert flash.takes(torch.empty(1, 2, 3, dim, dtype=torch.bfloat16, device=DEVICE))
    inputs = [leaf(2, 200, 4, dim, seed=1), leaf(2, 150, 2, dim, seed=2), leaf(2, 150, 2, dim, seed=3)]
    fast, slow = (partial(finite, form, query_start=offset) for form in (attention, attention_reference))
    assert max(errors(fast, slow, inputs, torch.bfloat16)) < BFLOAT16_BOUND
