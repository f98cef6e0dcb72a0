"""What a stretch of tokens does to the state that enters it, state_out = M state_in + c, as a message.

Shapes: B batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .shard import even_bounds
from .transitions import Transition


@dataclass(frozen=True)
class Segment:
    """An affine map over `tokens` tokens: its travelling numbers, whether earlier state survives (B,), its state."""

    transition: Transition
    travelling: Tensor | None
    keep: Tensor | None
    state: Tensor
    tokens: int

    def packed(self) -> Tensor:
        """Everything that travels, in one flat real tensor."""
        return torch.cat([as_real(part).reshape(-1) for part in self._parts()])

    def unpacked(self, flat: Tensor, tokens: int) -> Segment:
        """The segment that another process packed in the same form."""
        views, offset = [], 0
        for part in self._parts():
            real = as_real(part)
            view = flat[offset : offset + real.numel()].view(real.shape)
            # a clone: complex numbers must begin at an even offset
            views.append((torch.view_as_complex(view.clone()) if part.is_complex() else view).to(part.dtype))
            offset += real.numel()
        travelling = views[1] if self.travelling is not None else None
        keep = views[-1] if self.keep is not None else None
        return Segment(self.transition, travelling, keep, views[0], tokens)

    def numel(self) -> int:
        return sum(as_real(part).numel() for part in self._parts())

    def slices(self, number: int) -> list[Segment]:
        """The segment cut along channels (or heads) into at most `number` parts."""
        bounds = even_bounds(self.state.shape[1], min(number, self.state.shape[1]))
        return [self._slice(slice(a, b)) for a, b in itertools.pairwise(bounds)]

    def act(self, state: Tensor, *, transposed: bool) -> Tensor:
        """M state, the empty state where a document begins inside."""
        moved = self.transition.apply(self.travelling, self.tokens, state, transposed=transposed)
        if self.keep is not None:
            moved = self.transition.forget(moved, self.keep.reshape(-1, *([1] * (moved.dim() - 1))))
        return moved

    def after(self, state: Tensor, *, transposed: bool) -> Tensor:
        """M state + c."""
        return self.transition.merge(self.act(state, transposed=transposed), self.state)

    def _slice(self, part: slice) -> Segment:
        travelling = None if self.travelling is None else self.travelling[:, part]
        transition = self.transition.sliced(part, self.state)
        return Segment(transition, travelling, self.keep, self.state[:, part], self.tokens)

    def _parts(self) -> list[Tensor]:
        return [part for part in (self.state, self.travelling, self.keep) if part is not None]


def as_real(x: Tensor) -> Tensor:
    """Complex numbers as pairs in a last dimension; real ones as they are."""
    return torch.view_as_real(x) if x.is_complex() else x


def combine(earlier: Segment, later: Segment, *, reverse: bool) -> Segment:
    """One map for two stretches. In reverse, `earlier` is the one visited first, that is, the right-hand one."""
    travelling = keep = None
    left, right = (later, earlier) if reverse else (earlier, later)
    if left.travelling is not None and right.travelling is not None:
        travelling = left.transition.compose(left.travelling, right.travelling)
    if left.keep is not None and right.keep is not None:
        keep = left.keep * right.keep
    state = later.after(earlier.state, transposed=reverse)
    return Segment(later.transition, travelling, keep, state, earlier.tokens + later.tokens)
