"""Recurrences in stages: the state that leaves a part of a sequence is known, and can travel, before the outputs are.

A tensor that two stages read has a slot, zeros without memory, which the earlier stage returns and the later one reads
in name only. The gradient of the slot is the later stage's part of the tensor's gradient, in the dtype of the
computation; the backward of the earlier stage, which runs last, adds its own part in place. So the parts do not meet in
a sum of their own.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Stages(Protocol):
    """A recurrence over a part of a sequence whose entering state may still be under way.

    Send `leaving` on its way, `compute_local`, await the state that enters, `finish` with it. The backward pass runs
    the stages in reverse: the gradient of the entering state is ready first, that of `leaving` is needed last.
    """

    leaving: Tensor
    """The state after the last token had the sequence begun from zero."""

    def compute_local(self) -> None:
        """Most of the work: the outputs from zero. To be called once, before `finish`."""
        ...

    def finish(self, entering: Tensor, /) -> Tensor:
        """The outputs in the dtype of the inputs, given the state before the first token; to be called once."""
        ...


def slot(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of this shape without memory, of the dtype and on the device of `like`."""
    return like.new_zeros(()).expand(shape)
