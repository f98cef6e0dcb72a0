"""Cross-entropy of rows of logits on a GPU, between the library's matrix products.

Takes the place of portable.LinearCrossEntropy, argument for argument. The logits of a chunk stay in the dtype of the
hidden states; the kernel reads each row twice, computes in float32, and writes the gradient over it.

Legend: N tokens, S tokens of a chunk, D width, V vocabulary (of a block inside the kernel).
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import triton_support
from ..triton_support import interpreting, power_of_two
from .portable import LinearCrossEntropy, accumulate_


@triton.jit
def entropy_kernel(
    logits, targets, losses, vocabulary, logits_stride, targets_stride, ignore_index,
    GRADIENT: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row and, over its logits, their gradient; zeros where the target is `ignore_index`."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row * targets_stride)
    counts = target != ignore_index
    logits += row * logits_stride
    highest_V = tl.full([V_BLOCK], -1e38, dtype=tl.float32)  # finite: differences stay numbers behind the last column
    total_V = tl.zeros([V_BLOCK], dtype=tl.float32)
    own_V = tl.zeros([V_BLOCK], dtype=tl.float32)
    for first in range(0, tl.where(counts, vocabulary, 0), V_BLOCK):
        v = first + tl.arange(0, V_BLOCK)
        x_V = tl.load(logits + v, mask=v < vocabulary, other=-float("inf")).to(tl.float32)
        higher_V = tl.maximum(highest_V, x_V)
        total_V = total_V * tl.exp(highest_V - higher_V) + tl.exp(x_V - higher_V)
        highest_V = higher_V
        own_V = tl.where(v == target, x_V, own_V)
    highest = tl.where(counts, tl.max(highest_V, axis=0), 0.0)
    total = tl.where(counts, tl.sum(total_V * tl.exp(highest_V - highest), axis=0), 1.0)
    loss = highest - tl.sum(own_V, axis=0) + tl.log(total)
    inside = (target >= 0) & (target < vocabulary)
    tl.store(losses + row, tl.where(counts, tl.where(inside, loss, float("nan")), 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the logits
        for first in range(0, vocabulary, V_BLOCK):
            v = first + tl.arange(0, V_BLOCK)
            mask = v < vocabulary
            x_V = tl.load(logits + v, mask=mask & counts, other=0.0).to(tl.float32)
            grad_V = tl.exp(x_V - highest) / total - tl.where(v == target, 1.0, 0.0)
            tl.store(logits + v, tl.where(counts, grad_V, 0.0).to(logits.dtype.element_ty), mask=mask)


def _options(vocabulary: int) -> dict[str, int]:
    block = min(16 if interpreting() else 4096, power_of_two(vocabulary))
    return {"V_BLOCK": block, "num_warps": max(1, min(8, block // 256))}


class TritonLinearCrossEntropy(LinearCrossEntropy):
    """Sum of losses; see `linear_cross_entropy`. The backward, which only scales, is the portable one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        bias: Tensor | None,
        chunk_size: int,
        ignore_index: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        need_bias = bias is not None and ctx.needs_input_grad[3]
        tokens, vocabulary = len(hidden_ND), len(weight_VD)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        losses_N = torch.empty(tokens, dtype=torch.float32, device=hidden_ND.device)
        gradient = need_hidden or need_weight or need_bias
        for start in range(0, tokens, chunk_size):
            chunk = slice(start, min(start + chunk_size, tokens))
            hidden_SD, targets_S = hidden_ND[chunk], targets_N[chunk]
            grad_SV = F.linear(hidden_SD, weight_VD, bias)  # logits, until the kernel has run
            triton_support.launch(
                entropy_kernel, (len(grad_SV),), grad_SV, targets_S, losses_N[chunk], vocabulary, grad_SV.stride(0),
                targets_S.stride(0), ignore_index, GRADIENT=gradient, **_options(vocabulary),
            )  # fmt: skip
            if grad_bias is not None:
                grad_bias += grad_SV.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(grad_SV, weight_VD, out=grad_hidden[chunk])
            if grad_weight is not None:
                accumulate_(grad_weight, grad_SV.t(), hidden_SD)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VD.dtype, None if bias is None else bias.dtype)
        return losses_N.sum()
