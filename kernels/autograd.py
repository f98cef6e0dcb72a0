"""What the hand-written derivatives share."""

from collections.abc import Callable
from typing import TypeVar, cast

from torch.autograd.function import once_differentiable

Backward = TypeVar("Backward", bound=Callable)


def first_order(backward: Backward) -> Backward:
    """A second derivative raises an error instead of being wrong; `once_differentiable` with the signature kept."""
    return cast(Backward, once_differentiable(backward))
