"""The Triton kernels of gated linear attention against the step loop in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.gated_linear_attention import gated_linear_attention
from longstride.kernels.gated_linear_attention.reference import gated_linear_attention_reference

from .compare import leaf, start_mask
from .native import DEVICE, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_gated_linear_attention import arguments, full

pytestmark = needs_triton

# Several chunks and a short last one, sizes that fill no block.
SHAPES = [(1, 1, 1, 1, 1), (1, 21, 2, 3, 5), (1, 16, 1, 17, 2)]
if NATIVE:  # more than 64 keys or values: kernels in bfloat16, portable code in float32
    SHAPES += [(2, 1000, 3, 64, 64), (1, 300, 2, 64, 32), (1, 300, 2, 128, 32), (1, 200, 2, 32, 128)]


@pytest.mark.parametrize("decay", [0.1, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_step_loop(
    shape: tuple[int, ...], decay: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, slow = partial(full, gated_linear_attention), partial(full, gated_linear_attention_reference)
    from longstride.kernels.gated_linear_attention.triton_gated import fits

    inputs = arguments(*shape, decay=decay)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, inputs, dtype)
    if not fits(inputs[0].to(dtype), inputs[2].to(dtype)):
        assert not launched and dtype == torch.float32
        return
    # the backward makes the states again instead of keeping them
    assert launched.count("gated_states_kernel") == 3 and launched[-1] == "gated_gradient_kernel"


@pytest.mark.parametrize(("rows", "positions"), [(1, (0,)), (2, (15, 16, 17)), (1, (3, 4, 20))])
def test_documents(rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    starts = start_mask(rows, 21, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments(2, 21, 1, 3, 2)
    slow = partial(full, gated_linear_attention_reference, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(full, gated_linear_attention, document_starts=starts.to(DEVICE)), slow, inputs)
        # Negative control: without the mask the result is far off.
        assert max(errors(partial(full, gated_linear_attention), slow, inputs, torch.float32)) > 1e-3


def test_decays_that_no_product_of_factors_could_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token may erase everything while the next ones forget nothing; strided inputs."""

    def sliced(function, wide: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = wide.split((3, 3, 2), -1)
        return function(q, k, v, log_decay.transpose(1, 2))

    wide, log_decay = leaf(1, 21, 2, 8), -leaf(1, 2, 21, 3, seed=2).detach().abs() * 100
    log_decay[:, :, ::3] = -1e-3
    with triton_chosen(monkeypatch):
        pair = partial(sliced, gated_linear_attention), partial(sliced, gated_linear_attention_reference)
        assert_close(*pair, [wide, log_decay])
