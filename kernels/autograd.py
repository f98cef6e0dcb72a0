"""What the hand-written derivatives share."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = TypeVar("Function", bound=Callable)


def own_precision(function: Function) -> Function:
    """`function` in the dtypes of its arguments: autocast would make half types of the states between its products."""

    @wraps(function)
    def wrapped(*args: object) -> object:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args)

    return cast(Function, wrapped)


def first_order(backward: Function) -> Function:
    """A second derivative raises an error instead of being wrong; `once_differentiable` with the signature kept, and in
    its own precision."""
    return cast(Function, once_differentiable(own_precision(backward)))


def dense_gradient(x: Tensor) -> Tensor:
    """`x`, whose gradient will arrive contiguous. Batched products copy other layouts matrix by matrix."""
    if x.requires_grad:
        x.register_hook(Tensor.contiguous)
    return x
