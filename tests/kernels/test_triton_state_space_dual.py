"""The Triton kernels of the state-space dual against the step loop in float64: outputs and every gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from longstride.kernels.state_space_dual import state_space_dual
from longstride.kernels.state_space_dual.reference import state_space_dual_reference

from .compare import leaf, start_mask
from .native import DEVICE, NATIVE, assert_close, errors, needs_triton, triton_chosen
from .test_state_space_dual import WHOLE_AND_STAGED, arguments

pytestmark = needs_triton

# Several chunks and a short last one, groups of one and of several heads, sizes that fill no block.
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 37, 4, 3, 2, 5), (1, 16, 3, 17, 3, 2)]
if NATIVE:  # a width or states above 64: kernels in bfloat16, portable code in float32
    SHAPES += [(2, 1000, 16, 64, 1, 64), (2, 1000, 16, 64, 1, 128), (1, 300, 6, 128, 2, 16), (1, 200, 4, 32, 1, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WHOLE_AND_STAGED)
def test_equals_the_step_loop(
    way: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longstride.kernels.state_space_dual.triton_dual import fits

    (fast, slow), inputs = WHOLE_AND_STAGED[way], arguments(*shape)
    with triton_chosen(monkeypatch) as launched:
        assert_close(fast, slow, inputs, dtype)
    if not fits(inputs[0].to(dtype), inputs[2].to(dtype)):
        assert not launched and dtype == torch.float32
        return
    # the backward makes the states again instead of keeping them; in stages, each for itself
    assert launched.count("states_kernel") == (3 if way == "whole" else 4) and launched[-1] == "gradient_kernel"
    if way == "staged":
        assert launched.index("pass_kernel") < launched.index("output_kernel") < launched.index("readout_kernel")
        later, earlier = (index for index, name in enumerate(launched) if name == "gradient_kernel")
        assert launched.index("readout_gradient_kernel") < later < earlier


@pytest.mark.parametrize(("way", "rows"), [("whole", 1), ("whole", 2), ("staged", 2)])
@pytest.mark.parametrize("positions", [(0,), (15, 16, 17), (3, 4, 30, 36)])
def test_documents(way: str, rows: int, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = WHOLE_AND_STAGED[way]
    starts = start_mask(rows, 37, *[(index % rows, position) for index, position in enumerate(positions)])
    inputs = arguments(2, 37, 2, 3, 1, 2)
    slow = partial(slow, document_starts=starts)
    with triton_chosen(monkeypatch):
        assert_close(partial(fast, document_starts=starts.to(DEVICE)), slow, inputs)
        assert max(errors(fast, slow, inputs, torch.float32)) > 1e-3  # negative control


def test_fast_decays_and_shared_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decays that erase a chunk many times over; gradients of B and C by atomic additions; strided inputs."""

    def sliced(function, wide: Tensor, log_decay: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
        B, C = both.chunk(2, -1)
        return function(wide[..., 1:4], log_decay * 100, B, C)

    inputs = [leaf(1, 33, 12, 5), arguments(1, 33, 12, 1, 1, 1)[1].detach(), leaf(1, 33, 1, 6)]
    with triton_chosen(monkeypatch, deterministic=False):
        assert_close(partial(sliced, state_space_dual), partial(sliced, state_space_dual_reference), inputs)
