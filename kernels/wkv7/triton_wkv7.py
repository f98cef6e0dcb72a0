"""RWKV-7's recurrence on a GPU: chunks in parallel, states between them in order, each step one launch.

`systems_kernel` solves the triangular system of every chunk; `transition_kernel` makes what each chunk does to a state,
S' = S P + C, and `pass_kernel` walks with it from chunk to chunk, some rows of a state in the registers of a program:
rows do not meet. `output_kernel` has the outputs. In the backward pass `output_gradient_kernel` has r's gradient and
what the outputs give everything else, `pass_kernel` in reverse the adjoints, the other two gradient kernels the rest.
P and C are N / Q as large as the keys and the values: they, and for a whole sequence everything but the states, exist
for a piece of the chunks at a time, and are made again for the backward pass.

Why chunks, and not a walk from token to token: that is, for 65,536 tokens, as many steps of dependent reductions, a
microsecond or so each, in the few programs that rows of 32 or 64 heads make; and more backward, where one program must
hold a head, its gradients being sums over rows: half of the processors, a few tenths of a second. Why not batched
products of PyTorch: for heads of 64 in stages they read and write 62 KB a token and head forward and 157 backward, as
counted; the kernels read and write about 7 and 20. With 64 heads and 65,536 tokens forward, that is 80 ms and 10 at 3.2
TB/s. PyTorch's walk would be 4,096 launches, 65,536 for a million tokens; here it is one a piece. The 0.5 TFLOP of
products are 3 ms in TF32, taken three times. None of this has been timed.

For its backward pass a whole sequence keeps a state for each chunk of 32 tokens.

Legend: B batch, T tokens, H heads, N head width, V rows of a state (N, or 2 N in stages), M chunks, Q tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..segments import segment_tokens
from ..triton_support import interpreting, power_of_two, rows_contiguous
from .triton_chunks import output_kernel, pass_kernel, systems_kernel, transition_kernel
from .triton_gradients import output_gradient_kernel, pair_gradient_kernel, state_gradient_kernel

Piece = tuple[int, int]
WIDEST = 128  # head width that a program holds
ROWS = 16  # of a state at a time: the fewest that a product takes, and what leaves most registers


@dataclass(frozen=True)
class Chunks:
    """A sequence prepared for the kernels, and what they make of some of its chunks.

    A piece is (first chunk, how many); tensors of chunks that are given with one, or come of it, begin with that chunk.
    """

    log_w: Tensor  # minus infinity where a document begins
    k: Tensor
    v: Tensor
    a: Tensor  # zero where a document begins
    b: Tensor
    starts_BT: Tensor | None
    chunk: int
    step: int  # chunks of a piece

    @staticmethod
    def prepare(sequences: Sequence[Tensor], starts_BT: Tensor | None) -> Chunks:
        log_w, k, v, a, b = sequences
        batch, _, heads, width = k.shape
        if starts_BT is not None:
            log_w = log_w.masked_fill(starts_BT[..., None, None], -torch.inf)
            a = a.masked_fill(starts_BT[..., None, None], 0.0)
        chunk = 16 if interpreting() else 32
        step = segment_tokens(chunk, batch * heads * width * max(1, width // chunk), k.device) // chunk
        log_w, k, v, a, b = (rows_contiguous(x) for x in (log_w, k, v, a, b))
        return Chunks(log_w, k, v, a, b, starts_BT, chunk, step)

    @property
    def whole(self) -> Piece:
        return 0, -(-self.k.shape[1] // self.chunk)

    @property
    def pieces(self) -> list[Piece]:
        count = self.whole[1]
        return [(first, min(self.step, count - first)) for first in range(0, count, self.step)]

    def fresh(self, count: int, *shape: int) -> Tensor:
        """(`count` chunks, B, H, *shape)"""
        size = count, self.k.shape[0], self.k.shape[2], *shape
        return torch.empty(size, dtype=torch.float32, device=self.k.device)

    def part_shapes(self) -> list[tuple[int, ...]]:
        """Of the outputs' part in the gradients of log w, k, v, A~, b and A_ak, without those of `fresh`."""
        return [(self.chunk, self.k.shape[3])] * 5 + [(self.chunk, self.chunk)]

    def systems(self, piece: Piece) -> Tensor:
        """T and W, (M, B, H, 2, Q, Q)."""
        inner = self.fresh(piece[1], 2, self.chunk, self.chunk)
        used = self.log_w, self.k, self.a, self.b
        triton_support.launch(
            systems_kernel, self._grid(piece), *used, inner, piece[0], *self._sizes(),
            *(x.stride()[:3] for x in used), **self._options(),
        )  # fmt: skip
        return inner

    def states(self, piece: Piece, inner: Tensor, passing: Tensor) -> None:
        """The states (M + 1, B, H, V, N) before each chunk and after the last, from the first, which is given."""
        transition = self.fresh(piece[1], *passing.shape[4:] * 2)
        added = torch.empty_like(transition)
        self._transitions(piece, inner, transition, added)
        self._pass(piece, transition, added, passing, None)

    def adjoints(self, piece: Piece, inner: Tensor, grad_passing: Tensor, outermost: Tensor) -> None:
        """The adjoints of the states after each chunk in the place of the outputs' part of those before it, and that of
        the state before the first in the place of `outermost`, that of the last."""
        transition = self.fresh(piece[1], *grad_passing.shape[4:] * 2)
        self._transitions(piece, inner, transition, None)
        self._pass(piece, transition, None, grad_passing, outermost)

    def outputs(self, piece: Piece, r: Tensor, inner: Tensor, passing: Tensor, y_BTHV: Tensor) -> None:
        triton_support.launch(
            output_kernel, self._grid(piece), r, *self._sequences(), inner, passing, y_BTHV, piece[0],
            *self._sizes(passing), r.stride()[:3], *self._strides(), y_BTHV.stride()[:3], V_BLOCK=ROWS,
            **self._options(),
        )  # fmt: skip

    def output_gradients(
        self, piece: Piece, r: Tensor, inner: Tensor, passing: Tensor, grad_y_BTHV: Tensor, grad_r: Tensor,
        grad_passing: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """Writes r's gradient and the outputs' part in those of the states; returns that in the others."""
        parts = [self.fresh(piece[1], *shape) for shape in self.part_shapes()]
        grad_y_BTHV = rows_contiguous(grad_y_BTHV)
        triton_support.launch(
            output_gradient_kernel, self._grid(piece), r, *self._sequences(), inner, passing, grad_y_BTHV, grad_r,
            *parts, grad_passing, piece[0], *self._sizes(passing), r.stride()[:3], *self._strides(),
            grad_y_BTHV.stride()[:3], V_BLOCK=ROWS, **self._options(),
        )  # fmt: skip
        return parts

    def gradients(
        self, piece: Piece, inner: Tensor, passing: Tensor, adjoints: Tensor, parts: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Writes those of log w, k, v, a and b, given the parts of the outputs, which are used up."""
        part_w, part_k, part_v, part_a, part_b, part_ak = parts
        grad_w, grad_k, grad_v, grad_a, grad_b = grads
        crossing = self.fresh(piece[1], self.k.shape[3])
        triton_support.launch(
            state_gradient_kernel, self._grid(piece), *self._sequences(), inner, passing, adjoints, crossing,
            part_k, part_v, part_a, part_b, part_ak, grad_v, piece[0], *self._sizes(passing), *self._strides(),
            V_BLOCK=ROWS, **self._options(),
        )  # fmt: skip
        used = self.log_w, self.k, self.a, self.b
        triton_support.launch(
            pair_gradient_kernel, self._grid(piece), *used, inner, crossing, part_w, part_k, part_a, part_b, part_ak,
            grad_w, grad_k, grad_a, grad_b, piece[0], *self._sizes(), *(x.stride()[:3] for x in used),
            **self._options(),
        )  # fmt: skip

    def forget(self, grads: Sequence[Tensor]) -> None:
        """Nothing crosses a document's first token, and its a finds nothing."""
        if self.starts_BT is not None:
            for grad in (grads[0], grads[3]):
                grad.masked_fill_(self.starts_BT[..., None, None], 0.0)

    def _transitions(self, piece: Piece, inner: Tensor, transition: Tensor, added: Tensor | None) -> None:
        triton_support.launch(
            transition_kernel, self._grid(piece), *self._sequences(), inner, transition, added, piece[0],
            *self._sizes(), *self._strides(), **self._options(),
        )  # fmt: skip

    def _pass(
        self, piece: Piece, transition: Tensor, added: Tensor | None, passing: Tensor, outermost: Tensor | None
    ) -> None:
        _, batch, heads, values, width = passing.shape
        triton_support.launch(
            pass_kernel, (-(-values // ROWS), heads, batch), transition, added, passing, outermost, piece[1], heads,
            values, width, V_BLOCK=ROWS, N_BLOCK=max(16, power_of_two(width)), REVERSE=outermost is not None,
            num_warps=8, num_stages=1,
        )  # fmt: skip

    def _sequences(self) -> tuple[Tensor, ...]:
        return self.log_w, self.k, self.v, self.a, self.b

    def _strides(self) -> list[tuple[int, ...]]:
        return [x.stride()[:3] for x in self._sequences()]

    def _sizes(self, passing: Tensor | None = None) -> tuple[int, ...]:
        """length, heads, the states' rows if there are any, width: in the order of the kernels' arguments."""
        _, length, heads, width = self.k.shape
        return (length, heads, width) if passing is None else (length, heads, passing.shape[3], width)

    def _grid(self, piece: Piece) -> tuple[int, int, int]:
        return piece[1], self.k.shape[2], self.k.shape[0]

    def _options(self) -> dict[str, Any]:
        width = max(16, power_of_two(self.k.shape[3]))
        return {"Q": self.chunk, "N_BLOCK": width, "num_warps": 4 if width <= 64 else 8, "num_stages": 1}


def fresh_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Dense memory for their gradients."""
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


class TritonWkv7(torch.autograd.Function):
    """The recurrence of a whole sequence; call it through `wkv7`, which checks and prepares the arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        log_w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state_BHNN: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sequences, width = (log_w, k, v, a, b), k.shape[3]
        chunks, r = Chunks.prepare(sequences, starts_BT), rows_contiguous(r)
        passing = chunks.fresh(chunks.whole[1] + 1, width, width)
        passing[0] = state_BHNN
        (y,) = fresh_like([r])
        for piece in chunks.pieces:
            inner, here = chunks.systems(piece), passing[piece[0] :]
            chunks.states(piece, inner, here)
            chunks.outputs(piece, r, inner, here, y)
        ctx.save_for_backward(r, *sequences, starts_BT, passing)
        return y, passing[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        r, *sequences, starts_BT, passing = ctx.saved_tensors
        chunks, outermost = Chunks.prepare(sequences, starts_BT), grads[1].clone(memory_format=torch.contiguous_format)
        grad_r, *results = fresh_like([r, *sequences])
        for piece in reversed(chunks.pieces):
            inner, here = chunks.systems(piece), passing[piece[0] :]
            adjoints = chunks.fresh(piece[1], *passing.shape[3:])
            parts = chunks.output_gradients(piece, r, inner, here, grads[0], grad_r, adjoints)
            chunks.adjoints(piece, inner, adjoints, outermost)
            chunks.gradients(piece, inner, here, adjoints, parts, results)
        chunks.forget(results)
        return grad_r, *results, outermost, None
