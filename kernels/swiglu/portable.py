"""silu(gate) * up, keeping its two inputs only: autograd would keep silu(gate) as well."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import first_order


class SwiGLU(torch.autograd.Function):
    """See `swiglu`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
