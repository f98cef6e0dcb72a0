"""Walking a recurrence in segments with recomputation: the forward keeps one state per segment and nothing else.

The operation of one segment is written as ordinary differentiable PyTorch. The forward runs it without a graph; the
backward walks the segments from the right, runs each again with a graph, differentiates it and carries the gradient of
the state to the segment before. Memory is that of the arguments, of one segment, and of the states at the boundaries.

Legend: B batch, T tokens of the sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autograd import first_order, own_precision

# (state, slices of the sequences, parameters, slice of document_starts or None where it is all False) -> (y, state)
SegmentFunction = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Tensor | None], tuple[Tensor, Tensor]]


CACHE_ELEMENTS = 1 << 18  # of a segment's largest buffer on a CPU


def segment_tokens(chunk: int, elements_per_token: int, device: torch.device, *, least_chunks: int = 4) -> int:
    """Tokens of a segment, in whole chunks: few enough for a CPU's cache, many on devices where launches are dear."""
    elements = CACHE_ELEMENTS if device.type == "cpu" else CACHE_ELEMENTS << 6
    return chunk * max(least_chunks, elements // max(1, elements_per_token * chunk))


@dataclass(frozen=True)
class _Walk:
    """What does not change from segment to segment."""

    function: SegmentFunction
    ranges: list[tuple[int, int]]
    has_start: list[bool]
    sequences: int  # the first so many tensors run along the sequence, the others are parameters

    def run(
        self, index: int, state: Tensor, tensors: Sequence[Tensor], starts_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One segment; `tensors` are already cut."""
        start, stop = self.ranges[index]
        mask = starts_BT[:, start:stop] if starts_BT is not None and self.has_start[index] else None
        return self.function(state, tensors[: self.sequences], tensors[self.sequences :], mask)

    def cut(self, index: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        start, stop = self.ranges[index]
        return [x[:, start:stop] if i < self.sequences else x for i, x in enumerate(tensors)]


def walk(
    function: SegmentFunction,
    state: Tensor,
    sequences: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    *,
    segment: int,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `function` over a sequence cut into pieces of `segment` tokens. Returns (outputs, final state).

    Args:
        function: see SegmentFunction; its outputs are (B, tokens, ...), the state keeps shape and dtype.
        state: the state before the first token.
        sequences: tensors (B, T, ...), cut into segments. parameters: tensors every segment gets whole.
        starts_BT: boolean (B or 1, T) document starts.

    Gradients flow to the state, the sequences and the parameters, and from the outputs and the final state.
    """
    length = sequences[0].shape[1]
    ranges = [(start, min(start + segment, length)) for start in range(0, length, segment)] or [(0, 0)]
    has_start = [False] * len(ranges)
    if starts_BT is not None:
        has_start = torch.stack([starts_BT[:, start:stop].any() for start, stop in ranges]).tolist()
    plan = _Walk(function, ranges, has_start, len(sequences))
    return _WalkFunction.apply(plan, state, starts_BT, *sequences, *parameters)


class _WalkFunction(torch.autograd.Function):
    @staticmethod
    @own_precision
    def forward(
        ctx: Any, plan: _Walk, state: Tensor, starts_BT: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        boundaries = []
        y_BT: Tensor | None = None
        for index, (start, stop) in enumerate(plan.ranges):
            boundaries.append(state)
            part, state = plan.run(index, state, plan.cut(index, tensors), starts_BT)
            if y_BT is None:  # never `part` itself: a view could not be added to in place
                y_BT = part.new_empty(part.shape[0], plan.ranges[-1][1], *part.shape[2:])
            y_BT[:, start:stop] = part
        assert y_BT is not None
        ctx.plan = plan
        ctx.save_for_backward(starts_BT, *boundaries, *tensors)
        return y_BT, state.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y_BT, grad_state = grads
        plan: _Walk = ctx.plan
        starts_BT, *saved = ctx.saved_tensors
        boundaries, tensors = saved[: len(plan.ranges)], saved[len(plan.ranges) :]
        wanted = [i for i in range(len(tensors)) if ctx.needs_input_grad[3 + i]]
        out: list[Tensor | None] = [None] * len(tensors)
        for i in wanted:
            out[i] = torch.zeros_like(tensors[i]) if i >= plan.sequences else torch.empty_like(tensors[i])
        for index, (start, stop) in reversed(list(enumerate(plan.ranges))):
            state = boundaries[index].detach().requires_grad_()
            cut = [x.detach() for x in plan.cut(index, tensors)]
            for i in wanted:
                cut[i].requires_grad_()
            with torch.enable_grad():
                part, final = plan.run(index, state, cut, starts_BT)
            leaves = [state, *(cut[i] for i in wanted)]
            results = _gradients((part, final), leaves, (grad_y_BT[:, start:stop], grad_state))
            grad_state = results[0]
            for i, gradient in zip(wanted, results[1:], strict=True):
                target = out[i]
                assert target is not None
                if i < plan.sequences:
                    target[:, start:stop] = gradient
                else:
                    target.add_(gradient)
        return None, grad_state if ctx.needs_input_grad[1] else None, None, *out


def _gradients(
    outputs: tuple[Tensor, Tensor], leaves: list[Tensor], grad_outputs: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Gradients of the leaves, zeros where an output does not depend on one (an empty segment, a forgotten state)."""
    pairs = [(output, grad) for output, grad in zip(outputs, grad_outputs, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    results = torch.autograd.grad(
        [output for output, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True
    )
    return [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, results, strict=True)]
