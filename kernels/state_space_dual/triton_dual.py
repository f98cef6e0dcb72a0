"""State-space duality on a GPU: chunks in parallel, states between them in order.

`states_kernel` makes what each chunk adds to the state, `pass_kernel` carries states through the chunks (one decay per
head and chunk), `output_kernel` makes the outputs. The backward does the same with adjoints from the right, recomputes
the states instead of keeping them, and makes all gradients of a chunk in `gradient_kernel`.

Legend: B batch, T tokens, H heads, G groups of heads, P head width, N states, M chunks, Q tokens of one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_math import dot_type
from ..triton_support import batch_strides, interpreting, power_of_two, rows_contiguous
from .triton_chunks import gradient_kernel, output_kernel, pass_kernel, states_kernel


def fits(x_BTHP: Tensor, B_BTGN: Tensor) -> bool:
    """Whether a program can hold these head widths and states: float32 takes twice the shared memory."""
    widest = 64 if x_BTHP.dtype == torch.float32 and not interpreting() else 128
    return max(x_BTHP.shape[-1], B_BTGN.shape[-1]) <= widest


@dataclass(frozen=True)
class Inputs:
    """A sequence prepared for the kernels, and what they make of it."""

    x_BTHP: Tensor
    B_BTGN: Tensor
    C_BTGN: Tensor
    sums_BTH: Tensor  # summed log decays since the chunk's begin, double precision
    whole_BMH: Tensor  # decay of a chunk, zero where a document begins in it
    count_BT: Tensor | None  # documents begun, int32
    chunk: int

    @staticmethod
    def prepare(
        x_BTHP: Tensor, log_decay_BTH: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, starts_BT: Tensor | None
    ) -> "Inputs":
        batch, length, heads, _ = x_BTHP.shape
        chunk = 16 if interpreting() else 32 if x_BTHP.dtype == torch.float32 else 64
        chunks = -(-length // chunk)
        padded = torch.zeros(batch, chunks * chunk, heads, dtype=torch.float64, device=x_BTHP.device)
        padded[:, :length] = log_decay_BTH
        sums_BMQH = padded.view(batch, chunks, chunk, heads).cumsum(2)
        whole_BMH = sums_BMQH[:, :, -1].exp().float()
        count_BT = None
        if starts_BT is not None:
            count_BT = starts_BT.cumsum(1, dtype=torch.int32)
            ends = torch.arange(1, chunks + 1, device=x_BTHP.device).mul_(chunk).clamp_(max=length) - 1
            last_BM = count_BT[:, ends]
            unbroken_BM = last_BM.diff(dim=1, prepend=torch.zeros_like(last_BM[:, :1])) == 0
            whole_BMH = whole_BMH * unbroken_BM.unsqueeze(2)
        sums_BTH = sums_BMQH.flatten(1, 2)[:, :length].contiguous()
        x_BTHP, B_BTGN, C_BTGN = rows_contiguous(x_BTHP), rows_contiguous(B_BTGN), rows_contiguous(C_BTGN)
        return Inputs(x_BTHP, B_BTGN, C_BTGN, sums_BTH, whole_BMH.contiguous(), count_BT, chunk)

    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """length, heads, groups, width, states, chunks: in the order of the kernels' arguments."""
        _, length, heads, width = self.x_BTHP.shape
        groups, states = self.B_BTGN.shape[2:]
        return length, heads, groups, width, states, self.whole_BMH.shape[1]

    def options(self) -> dict[str, Any]:
        _, _, _, width, states, _ = self.sizes()
        blocks = {"P_BLOCK": max(16, power_of_two(width)), "N_BLOCK": max(16, power_of_two(states))}
        return {"Q": self.chunk, "DOT": dot_type(self.x_BTHP.dtype), "num_warps": 8, "num_stages": 1, **blocks}

    def count_stride(self) -> int:
        return batch_strides(self.count_BT)[0]

    def entering(self, initial_BHPN: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states that enter the chunks (B, M, H, P, N), from `initial_BHPN` or zero, and the last."""
        return self._carried(self.x_BTHP, self.B_BTGN, initial_BHPN, reverse=False)

    def adjoints(self, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the states that leave the chunks (B, M, H, P, N), and of the one before the first."""
        return self._carried(rows_contiguous(grad_y), self.C_BTGN, grad_final, reverse=True)

    def _carried(self, x: Tensor, B: Tensor, outermost_BHPN: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
        _, heads, _, width, states, chunks = self.sizes()
        batch = x.shape[0]
        added = self.whole_BMH.new_empty(batch, chunks, heads, width, states)
        triton_support.launch(
            states_kernel, (chunks, heads, batch), x, self.sums_BTH, B, self.count_BT, added, *self.sizes(),
            x.stride()[:3], B.stride()[:3], self.count_stride(), REVERSE=reverse, **self.options(),
        )  # fmt: skip
        if outermost_BHPN is None:
            outermost_BHPN = self.whole_BMH.new_zeros(batch, heads, width, states)
        return pass_states(added, self.whole_BMH, outermost_BHPN, reverse=reverse)

    def outputs(self, entering: Tensor) -> Tensor:
        """y_BTHP in the dtype of x, given the states that enter the chunks."""
        x, B, C = self.x_BTHP, self.B_BTGN, self.C_BTGN
        y_BTHP = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _, heads, _, _, _, chunks = self.sizes()
        triton_support.launch(
            output_kernel, (chunks, heads, x.shape[0]), x, self.sums_BTH, B, C, self.count_BT, entering, y_BTHP,
            *self.sizes(), x.stride()[:3], B.stride()[:3], C.stride()[:3], self.count_stride(), **self.options(),
        )  # fmt: skip
        return y_BTHP

    def gradients(self, grad_y: Tensor, carried: Tensor, *, later: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients at one end of all pairs of a chunk's tokens: (of x, of B or C, of the summed log decays, BTH).

        `later`: at the outputs' end, with the entering states: no gradient of x, that of C, what exponents gain there.
        Otherwise at the inputs' end, with the adjoints: those of x and B, and what exponents lose there.
        """
        grad_y = rows_contiguous(grad_y)
        x, B, C = self.x_BTHP, self.B_BTGN, self.C_BTGN
        length, heads, groups, _, states, chunks = self.sizes()
        batch, shared = x.shape[0], heads // groups
        together = next(count for count in (8, 4, 2, 1) if shared % count == 0)
        partials = shared // together if torch.are_deterministic_algorithms_enabled() else 1
        grad_own = carried.new_zeros(partials, batch, length, groups, states)
        grad_x = None if later else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_sums = carried.new_empty(batch, length, heads)
        mine, theirs, own, other = (grad_y, x, C, B) if later else (x, grad_y, B, C)
        triton_support.launch(
            gradient_kernel, (chunks, heads // together, batch), mine, theirs, self.sums_BTH, own, other,
            self.count_BT, carried, grad_x, grad_sums, grad_own, *self.sizes(),
            grad_own[0].numel() if partials > 1 else 0, mine.stride()[:3], theirs.stride()[:3], own.stride()[:3],
            other.stride()[:3], self.count_stride(), HEADS=together, LATER=later, **self.options(),
        )  # fmt: skip
        return grad_x, grad_own.sum(0).to(own.dtype), grad_sums

    def crossing(self, entering: Tensor, adjoints: Tensor) -> Tensor:
        """(B, M, H), gradients of the chunks' whole sums by what crosses the chunks."""
        return (entering.flatten(3).unsqueeze(3) @ adjoints.flatten(3).unsqueeze(4)).flatten(2) * self.whole_BMH


def pass_states(added_BMH: Tensor, whole_BMH: Tensor, outermost_BH: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """What enters each chunk, from the left or in reverse, and what leaves the outermost one; float32 matrices of any
    shape behind (B, M, H), with one decay for each or, `whole_BMH` being (B, M, H, rows), for each of their rows."""
    batch, chunks, heads = added_BMH.shape[:3]
    carried, last = torch.empty_like(added_BMH), torch.empty_like(added_BMH[:, 0])
    size = last[0, 0].numel()
    block = min(1024, power_of_two(size))
    triton_support.launch(
        pass_kernel, (-(-size // block), heads, batch), added_BMH, whole_BMH, outermost_BH.contiguous(), carried, last,
        heads, size, size // whole_BMH[0, 0, 0].numel(), chunks, BLOCK=block, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
    return carried, last


class TritonDual(torch.autograd.Function):
    """See `state_space_dual`, which checks and prepares the arguments; states are float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTHP: Tensor,
        log_decay_BTH: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        initial_BHPN: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs.prepare(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT)
        entering, final = inputs.entering(initial_BHPN)
        ctx.save_for_backward(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_BHPN, starts_BT)
        return inputs.outputs(entering), final

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, grad_final = grads
        x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, initial_BHPN, starts_BT = ctx.saved_tensors
        inputs = Inputs.prepare(x_BTHP, log_decay_BTH, B_BTGN, C_BTGN, starts_BT)
        entering, _ = inputs.entering(initial_BHPN)
        adjoints, grad_initial = inputs.adjoints(grad_y, grad_final)
        _, grad_C, later = inputs.gradients(grad_y, entering, later=True)
        grad_x, grad_B, earlier = inputs.gradients(grad_y, adjoints, later=False)
        grad_log = suffix_sums(later - earlier, inputs.chunk, inputs.crossing(entering, adjoints))
        return grad_x, grad_log.to(log_decay_BTH.dtype), grad_B, grad_C, grad_initial, None


def suffix_sums(grad_sums_BTH: Tensor, chunk: int, last_BMH: Tensor | None) -> Tensor:
    """Each log decay counts in its own token's sum and in all later ones of the chunk; `last` is that of the whole."""
    batch, length, heads = grad_sums_BTH.shape
    padded = grad_sums_BTH.new_zeros(batch, -(-length // chunk) * chunk, heads)
    padded[:, :length] = grad_sums_BTH
    sums_BMQH = padded.view(batch, -1, chunk, heads).flip(2).cumsum(2).flip(2)
    if last_BMH is not None:
        sums_BMQH = sums_BMQH + last_BMH.unsqueeze(2)
    return sums_BMQH.flatten(1, 2)[:, :length]
