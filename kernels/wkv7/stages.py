"""RWKV-7's recurrence in three stages, so that a split sequence's states travel while its outputs are computed.

First the triangular systems of all chunks, and from chunk to chunk E = [S; R]: the state had the sequence begun from
zero, above the product of the transitions, both of which E' = E P + [C; 0] takes further; so what leaves. Then, per
token, the outputs from zero and the question z to the state S that enters the sequence: a chunk's question q to the
state before it, which is S R + that from zero, is R q to S. Last y += S z, one product. In the backward pass the
gradient of the entering state is ready after the first of the stages, and only the last needs that of what leaves.

Between the stages and for the backward pass lie, beside the arguments, the outputs, z and the chunks' answers (two
vectors a token), and E before each chunk. What else a chunk needs is made again. For slots see kernels/stages.py.

Legend: as in portable.py; a chunk's tensors (M, B, H, Q, N), E (M, B, H, 2 N, N), answers (M, B, H, Q, 2 N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import expect_shape
from ..autograd import first_order, own_precision
from ..stages import slot
from .portable import Decays, ask, by_head, by_token, solve


@dataclass(frozen=True)
class Plan:
    """How the stages go through a sequence: `step` chunks of `chunk` tokens at a time, in `dtype`."""

    length: int
    chunk: int
    step: int
    moderate: bool
    dtype: torch.dtype
    starts_BT: Tensor | None

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def pieces(self) -> list[slice]:
        """Of the chunks."""
        return [slice(first, min(first + self.step, self.chunks)) for first in range(0, self.chunks, self.step)]

    def tokens(self, piece: slice) -> slice:
        return slice(piece.start * self.chunk, min(piece.stop * self.chunk, self.length))

    def cut(self, x_BTHN: Tensor, piece: slice) -> Tensor:
        return by_head(x_BTHN[:, self.tokens(piece)], self.chunk, self.dtype).contiguous()

    def add(self, to_BTHN: Tensor, piece: slice, part: Tensor) -> None:
        target = to_BTHN[:, self.tokens(piece)]
        target += by_token(part, target.shape[1])

    def put(self, to_BTHN: Tensor, piece: slice, part: Tensor) -> None:
        target = to_BTHN[:, self.tokens(piece)]
        target.copy_(by_token(part, target.shape[1]))

    def decays(self, log_w: Tensor, piece: slice) -> Decays:
        starts_BT = None if self.starts_BT is None else self.starts_BT[:, self.tokens(piece)]
        return Decays.of(log_w, starts_BT, self.moderate)


class States(torch.autograd.Function):
    """(answers, E before each chunk and after the last, the last once more, slots of log_w, k, v and b).

    What is done with the E that leaves is done with the copy: its gradient arrives there.
    """

    @staticmethod
    @own_precision
    def forward(
        ctx: Any, plan: Plan, log_w_BTHN: Tensor, k_BTHN: Tensor, v_BTHN: Tensor, a_BTHN: Tensor, b_BTHN: Tensor
    ) -> tuple[Tensor, ...]:
        sequences = log_w_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN
        (batch, _, heads, width), chunks = k_BTHN.shape, plan.chunks
        like = torch.empty(0, dtype=plan.dtype, device=k_BTHN.device)
        answers = like.new_empty(chunks, batch, heads, plan.chunk, 2 * width)
        passing = like.new_zeros(chunks + 1, batch, heads, 2 * width, width)
        passing[0, :, :, width:].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        for piece in plan.pieces:
            log_w, k, v, a, b = (plan.cut(x, piece) for x in sequences)
            answers[piece], transition, added = solve(k, v, a, b, log_w, plan.decays(log_w, piece))
            for index, P, C in zip(range(chunks)[piece], transition.unbind(0), added.unbind(0), strict=True):
                torch.bmm(passing[index].flatten(0, 1), P.flatten(0, 1), out=passing[index + 1].flatten(0, 1))
                passing[index + 1, :, :, :width] += C
        ctx.plan = plan
        ctx.save_for_backward(*sequences, passing)
        slots = (slot(x.shape, answers) for x in (log_w_BTHN, k_BTHN, v_BTHN, b_BTHN))
        return answers, passing, passing[-1].clone(), *slots

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_answers, grad_passing, adjoint, grad_w, grad_k, grad_v, grad_b = grads
        plan: Plan = ctx.plan
        *sequences, passing = ctx.saved_tensors
        grad_a, width = torch.zeros_like(grad_k), passing.shape[-1]
        for piece in reversed(plan.pieces):
            with torch.enable_grad():
                log_w, k, v, a, b = leaves = [plan.cut(x.detach(), piece).requires_grad_() for x in sequences]
                results = solve(k, v, a, b, log_w, plan.decays(log_w, piece))
            P = results[1].detach()
            adjoints = torch.empty_like(passing[piece])
            for index in reversed(range(len(P))):
                adjoints[index] = adjoint
                turned = torch.bmm(adjoint.flatten(0, 1), P[index].flatten(0, 1).mT).view_as(adjoint)
                adjoint = turned + grad_passing[piece][index]
            gradients = grad_answers[piece], passing[piece].mT @ adjoints, adjoints[..., :width, :]
            parts = torch.autograd.grad(results, leaves, gradients)
            for whole, part in zip((grad_w, grad_k, grad_v, grad_a, grad_b), parts, strict=True):
                plan.add(whole, piece, part)
        wholes = zip((grad_w, grad_k, grad_v, grad_a, grad_b), sequences, strict=True)
        return None, *(whole.to(of.dtype) for whole, of in wholes)


class Local(torch.autograd.Function):
    """(the outputs from zero, the questions z to the state that enters): both (B, H, T, N), T filled up to chunks."""

    @staticmethod
    @own_precision
    def forward(
        ctx: Any, plan: Plan, r_BTHN: Tensor, log_w_BTHN: Tensor, k_BTHN: Tensor, v_BTHN: Tensor, b_BTHN: Tensor,
        answers: Tensor, passing: Tensor, *slots: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        sequences = r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, b_BTHN
        batch, _, heads, width = r_BTHN.shape
        y, z = (answers.new_empty(batch, heads, plan.chunks, plan.chunk, width) for _ in range(2))
        for piece in plan.pieces:
            r, log_w, k, v, b = (plan.cut(x, piece) for x in sequences)
            parts = _local(r, k, v, b, answers[piece], passing[piece], plan.decays(log_w, piece))
            y[:, :, piece], z[:, :, piece] = (part.permute(1, 2, 0, 3, 4) for part in parts)
        ctx.plan = plan
        ctx.save_for_backward(*sequences, answers, passing)
        return y.flatten(2, 3), z.flatten(2, 3)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        *sequences, answers, passing = ctx.saved_tensors
        grad_y, grad_z = (grad.unflatten(2, (plan.chunks, plan.chunk)).permute(2, 0, 1, 3, 4) for grad in grads)
        grad_answers, grad_passing = torch.empty_like(answers), torch.zeros_like(passing)
        wholes = [torch.empty(x.shape, dtype=plan.dtype, device=x.device) for x in sequences]
        for piece in plan.pieces:
            with torch.enable_grad():
                leaves = [plan.cut(x.detach(), piece).requires_grad_() for x in sequences]
                leaves += [x[piece].detach().requires_grad_() for x in (answers, passing)]
                r, log_w, k, v, b, answered, passed = leaves
                parts = _local(r, k, v, b, answered, passed, plan.decays(log_w, piece))
            results = torch.autograd.grad(parts, leaves, (grad_y[piece], grad_z[piece]))
            for whole, part in zip(wholes, results, strict=False):
                plan.put(whole, piece, part)
            grad_answers[piece], grad_passing[piece] = results[5:]
        grad_r, *grad_slots = wholes
        unread = (None,) * 4
        return None, grad_r.to(sequences[0].dtype), *unread, grad_answers, grad_passing, *grad_slots


def _local(
    r: Tensor, k: Tensor, v: Tensor, b: Tensor, answers: Tensor, passing: Tensor, decays: Decays
) -> tuple[Tensor, Tensor]:
    own, questions = ask(r, k, v, b, answers, decays)
    from_zero, asked = (questions @ passing.mT).split(r.shape[-1], -1)
    return own + from_zero, asked


class Wkv7Stages:
    """A recurrence whose entering state may still be under way; see `begin_wkv7`.

    Attributes:
        leaving: (B, H, N, N), the state after the last token had the sequence begun from zero.
        transition: (B, H, N, N), what the state that enters is multiplied by, from the right, before `leaving` is
            added; zero where a document begins in the sequence.
    """

    def __init__(
        self,
        leaving: Tensor,
        local: Callable[[Tensor], tuple[Tensor, Tensor]],
        shape: tuple[int, ...],
    ) -> None:
        """The E that leaves, and what gives y from zero and z, (B, H, T or more, N), for an r of this shape."""
        self._local, self._shape = local, shape
        self.leaving, self.transition = leaving.chunk(2, -2)

    def compute_local(self, r_BTHN: Tensor) -> None:
        """The outputs from zero; to be called once, between the sending of what leaves and `finish`.

        Raises:
            ValueError: unless r has the shape of the other sequences.
        """
        expect_shape("wkv7", "r_BTHN", r_BTHN, self._shape)
        self._y, self._z = self._local(r_BTHN)
        self._dtype = r_BTHN.dtype

    @own_precision
    def finish(self, entering_BHNN: Tensor) -> Tensor:
        """y_BTHN in the dtype of r, given the state before the first token; to be called once.

        Raises:
            ValueError: unless the state has the shape of `leaving`.
        """
        expect_shape("wkv7", "entering_BHNN", entering_BHNN, tuple(self.leaving.shape))
        y, z = self._y.flatten(0, 1), self._z.flatten(0, 1)
        y = torch.baddbmm(y, z, entering_BHNN.to(self.leaving.dtype).flatten(0, 1).mT).view(self._y.shape)
        return y.transpose(1, 2)[:, : self._shape[1]].to(self._dtype).contiguous()


def portable_stages(plan: Plan, stored: tuple[Tensor, ...]) -> Wkv7Stages:
    """The stages in PyTorch; see `begin_wkv7`, which checks the arguments."""
    log_w_BTHN, k_BTHN, v_BTHN, _, b_BTHN = stored
    answers, passing, leaving, *slots = States.apply(plan, *stored)
    read = [x.detach() for x in (log_w_BTHN, k_BTHN, v_BTHN, b_BTHN)]

    def local(r_BTHN: Tensor) -> tuple[Tensor, Tensor]:
        return Local.apply(plan, r_BTHN, *read, answers, passing, *slots)

    return Wkv7Stages(leaving, local, tuple(k_BTHN.shape))
