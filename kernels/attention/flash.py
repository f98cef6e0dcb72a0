"""One tile of attention by PyTorch's flash attention (T. Dao, arXiv 2307.08691): on GPUs, for half types.

Legend: B batch, H query heads, G key and value heads, T queries, S keys, K head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_HEAD = 256
_ALIGNED = 8  # the kernels read heads of a multiple of so many numbers


def takes(q_BHTK: Tensor) -> bool:
    """Whether there is such a kernel for these queries."""
    half = q_BHTK.dtype in (torch.float16, torch.bfloat16)
    fits = q_BHTK.is_cuda and half and q_BHTK.shape[-1] <= _LARGEST_HEAD
    return fits and torch.cuda.get_device_capability(q_BHTK.device) >= (8, 0)


def _aligned(x_BHTK: Tensor) -> Tensor:
    missing = -x_BHTK.shape[-1] % _ALIGNED
    return F.pad(x_BHTK, (0, missing)) if missing else x_BHTK


def tile_forward(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out_BHTK, lse_BHT)."""
    q, k, v = (_aligned(x) for x in (q_BHTK, k_BGSK, v_BGSK))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out[..., : q_BHTK.shape[-1]], lse


def tile_backward(
    grad_BHTK: Tensor,
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    out_BHTK: Tensor,
    lse_BHT: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and log-sum-exp over ALL tiles of these queries."""
    grad, q, k, v, out = (_aligned(x) for x in (grad_BHTK, q_BHTK, k_BGSK, v_BGSK, out_BHTK))
    # the kernel takes the log-sum-exp for dense without looking, and without dropout no random state
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse_BHT.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused,
        scale=scale,
    )  # fmt: skip
    grad_q, grad_k, grad_v = (x[..., : q_BHTK.shape[-1]] for x in grads)
    return grad_q, grad_k, grad_v
