"""Gated linear attention on a GPU: chunks in parallel, states between them in order.

`gated_states_kernel` makes what each chunk adds to the state, the dual form's `pass_kernel` carries states through the
chunks (one decay for each key), `gated_output_kernel` makes the outputs. The backward does the same with adjoints from
the right, recomputes the states instead of keeping them, and makes all gradients in `gated_gradient_kernel`.

Legend: B batch, T tokens, H heads, K keys and V values of a head, M chunks, Q tokens of one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..state_space_dual.triton_dual import pass_states
from ..triton_math import dot_type
from ..triton_support import interpreting, power_of_two, rows_contiguous
from .triton_chunks import gated_gradient_kernel, gated_output_kernel, gated_states_kernel


def fits(q_BTHK: Tensor, v_BTHV: Tensor) -> bool:
    """Whether a program can hold these heads: float32 takes twice the shared memory."""
    widest = 64 if v_BTHV.dtype == torch.float32 and not interpreting() else 128
    return max(q_BTHK.shape[-1], v_BTHV.shape[-1]) <= widest


@dataclass(frozen=True)
class _Inputs:
    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_BTHK: Tensor  # float32; minus infinity where a document begins
    chunk: int

    @staticmethod
    def prepare(sequences: tuple[Tensor, ...], starts_BT: Tensor | None) -> "_Inputs":
        q_BTHK, k_BTHK, v_BTHV, log_BTHK = (rows_contiguous(x) for x in sequences)
        log_BTHK = log_BTHK.float()
        if starts_BT is not None:
            log_BTHK = log_BTHK.masked_fill(starts_BT[..., None, None], -torch.inf)
        chunk = 16 if interpreting() else 32 if v_BTHV.dtype == torch.float32 else 64
        return _Inputs(q_BTHK, k_BTHK, v_BTHV, log_BTHK, chunk)

    def sizes(self) -> tuple[int, int, int, int, int]:
        """length, heads, keys, values, chunks: in the order of the kernels' arguments."""
        _, length, heads, keys = self.q_BTHK.shape
        return length, heads, keys, self.v_BTHV.shape[3], -(-length // self.chunk)

    def grid(self) -> tuple[int, int, int]:
        return self.sizes()[4], self.sizes()[1], self.q_BTHK.shape[0]

    def options(self) -> dict[str, Any]:
        _, _, keys, values, _ = self.sizes()
        blocks = {"K_BLOCK": max(16, power_of_two(keys)), "V_BLOCK": max(16, power_of_two(values))}
        return {"Q": self.chunk, "DOT": dot_type(self.v_BTHV.dtype), "num_warps": 8, "num_stages": 1, **blocks}

    def _added(self, k: Tensor, v: Tensor, whole_BMHK: Tensor, *, reverse: bool) -> Tensor:
        _, heads, keys, values, chunks = self.sizes()
        added_BMHKV = whole_BMHK.new_empty(k.shape[0], chunks, heads, keys, values)
        triton_support.launch(
            gated_states_kernel, self.grid(), k, v, self.log_BTHK, added_BMHKV, whole_BMHK, *self.sizes(),
            k.stride()[:3], v.stride()[:3], self.log_BTHK.stride()[:3], REVERSE=reverse, **self.options(),
        )  # fmt: skip
        return added_BMHKV

    def states(self, initial_BHKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states that enter each chunk (B, M, H, K, V), the last one, and the chunks' decays (B, M, H, K)."""
        _, heads, keys, _, chunks = self.sizes()
        whole_BMHK = initial_BHKV.new_empty(self.q_BTHK.shape[0], chunks, heads, keys)
        added_BMHKV = self._added(self.k_BTHK, self.v_BTHV, whole_BMHK, reverse=False)
        return (*pass_states(added_BMHKV, whole_BMHK, initial_BHKV, reverse=False), whole_BMHK)

    def adjoints(self, grad_y: Tensor, grad_final: Tensor, whole_BMHK: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoints of the states that leave each chunk, and that of the initial one."""
        added_BMHKV = self._added(self.q_BTHK, grad_y, whole_BMHK, reverse=True)
        return pass_states(added_BMHKV, whole_BMHK, grad_final, reverse=True)


class TritonGated(torch.autograd.Function):
    """See `gated_linear_attention`, which checks and prepares the arguments; states are float32."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTHK: Tensor,
        v_BTHV: Tensor,
        log_decay_BTHK: Tensor,
        initial_BHKV: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sequences = (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK)
        inputs = _Inputs.prepare(sequences, starts_BT)
        entering, final, _ = inputs.states(initial_BHKV)
        q, k, v, log = inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.log_BTHK
        y_BTHV = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        triton_support.launch(
            gated_output_kernel, inputs.grid(), q, k, v, log, entering, y_BTHV, *inputs.sizes(), q.stride()[:3],
            k.stride()[:3], v.stride()[:3], log.stride()[:3], **inputs.options(),
        )  # fmt: skip
        ctx.save_for_backward(*sequences, initial_BHKV, starts_BT)
        return y_BTHV, final

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, grad_final = rows_contiguous(grads[0]), grads[1]
        *sequences, initial_BHKV, starts_BT = ctx.saved_tensors
        inputs = _Inputs.prepare(tuple(sequences), starts_BT)
        entering, final, whole_BMHK = inputs.states(initial_BHKV)
        adjoints, grad_initial = inputs.adjoints(grad_y, grad_final, whole_BMHK)
        q, k, v, log = inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.log_BTHK
        results = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sequences]
        triton_support.launch(
            gated_gradient_kernel, inputs.grid(), q, k, v, log, grad_y, entering, final, adjoints, *results,
            *inputs.sizes(), q.stride()[:3], k.stride()[:3], v.stride()[:3], log.stride()[:3], grad_y.stride()[:3],
            **inputs.options(),
        )  # fmt: skip
        if starts_BT is not None:
            results[3].masked_fill_(starts_BT[..., None, None], 0.0)  # nothing crosses a document's first token
        return *results, grad_initial, None
