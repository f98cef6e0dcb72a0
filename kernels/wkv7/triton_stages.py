"""The three stages of RWKV-7's recurrence on a GPU; see stages.py for what they are and triton_wkv7.py for the kernels.

E = [S; R], the state from zero above the product of the transitions, is a state with twice the rows, of which the lower
half stores nothing: the kernels of a whole sequence take it as it is, and the outputs of its rows are y from zero and
the question z to the state that enters. T and W of all chunks are kept, too, since every stage needs them.

Legend: as in triton_wkv7.py.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..stages import slot
from ..triton_support import rows_contiguous
from .stages import Wkv7Stages
from .triton_wkv7 import Chunks, fresh_like


class _States(torch.autograd.Function):
    """(T and W, E before each chunk and after the last, the last once more, slots of log_w, k, v, A~, b, A_ak).

    What is done with the E that leaves is done with the copy: its gradient arrives there.
    """

    @staticmethod
    def forward(
        ctx: Any, starts_BT: Tensor | None, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
    ) -> tuple[Tensor, ...]:
        sequences, width = (log_w, k, v, a, b), k.shape[3]
        chunks = Chunks.prepare(sequences, starts_BT)
        count, inner = chunks.whole[1], chunks.systems(chunks.whole)
        passing = chunks.fresh(count + 1, 2 * width, width)
        passing[0].zero_()
        passing[0, :, :, width:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        for piece in chunks.pieces:
            chunks.states(piece, inner[piece[0] :], passing[piece[0] :])
        ctx.save_for_backward(*sequences, starts_BT, inner, passing)
        ctx.mark_non_differentiable(inner)
        slots = (slot((*inner.shape[:3], *shape), inner) for shape in chunks.part_shapes())
        return inner, passing, passing[-1].clone(), *slots

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, adjoints, grad_leaving, *parts = grads
        *sequences, starts_BT, inner, passing = ctx.saved_tensors
        chunks = Chunks.prepare(sequences, starts_BT)
        outermost = grad_leaving.clone(memory_format=torch.contiguous_format)
        for piece in reversed(chunks.pieces):
            chunks.adjoints(piece, inner[piece[0] :], adjoints[piece[0] :], outermost)
        results = fresh_like(sequences)
        chunks.gradients(chunks.whole, inner, passing, adjoints, parts, results)
        chunks.forget(results)
        return None, *results


class _Local(torch.autograd.Function):
    """The outputs of E's rows (B, H, T, 2 N): y from zero, and z."""

    @staticmethod
    def forward(
        ctx: Any, starts_BT: Tensor | None, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor,
        inner: Tensor, passing: Tensor, *slots: Tensor,
    ) -> Tensor:  # fmt: skip
        batch, length, heads, width = k.shape
        chunks, r = Chunks.prepare((log_w, k, v, a, b), starts_BT), rows_contiguous(r)
        y_BHTV = torch.empty(batch, heads, length, 2 * width, dtype=torch.float32, device=k.device)
        chunks.outputs(chunks.whole, r, inner, passing, y_BHTV.transpose(1, 2))
        ctx.save_for_backward(starts_BT, r, log_w, k, v, a, b, inner, passing)
        return y_BHTV

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        starts_BT, r, *sequences, inner, passing = ctx.saved_tensors
        chunks, (grad_r, grad_passing) = Chunks.prepare(sequences, starts_BT), fresh_like([r, passing])
        grad_passing[-1].zero_()
        grad_y_BTHV = grads[0].transpose(1, 2)
        parts = chunks.output_gradients(chunks.whole, r, inner, passing, grad_y_BTHV, grad_r, grad_passing)
        unread = (None,) * 6
        return None, grad_r, *unread, grad_passing, *parts


def triton_stages(stored: tuple[Tensor, ...], starts_BT: Tensor | None) -> Wkv7Stages:
    """See `begin_wkv7`, which checks the arguments; states are float32."""
    inner, passing, leaving, *slots = _States.apply(starts_BT, *stored)
    read = [x.detach() for x in stored]

    def local(r: Tensor) -> tuple[Tensor, Tensor]:
        y, z = _Local.apply(starts_BT, r, *read, inner, passing, *slots).chunk(2, -1)
        return y, z

    return Wkv7Stages(leaving, local, tuple(stored[0].shape))
