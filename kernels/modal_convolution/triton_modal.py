"""Modal convolution on a GPU, as a scan with constant decay.

Segments of tokens run in parallel: first each from zero (`walk_kernel` without outputs), then the states that enter
them are carried through in double precision (`pass_kernel`, with powers of the poles taken from their logarithms), then
each again from its true state. The gradient of the input is the same walk from the right; those of poles and residues
come from a walk to the right that takes the derivative of the state along, so that no state is ever kept.

Legend: B batch, T tokens, D channels, N modes per channel, S segments; parts: one of a real number, two of a complex.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..autograd import first_order
from ..triton_support import as_bytes, batch_strides, interpreting, power_of_two, rows_contiguous
from .triton_walks import mode_gradient_kernel, pass_kernel, walk_kernel

WIDEST = 64  # modes of a channel that a program holds


def planes(x_DN: Tensor, dtype: torch.dtype) -> Tensor:
    """(parts, ..., N, D) of (..., D, N): real and imaginary parts apart, channels last."""
    parts = torch.view_as_real(x_DN.resolve_conj()).movedim(-1, 0) if x_DN.is_complex() else x_DN.unsqueeze(0)
    return parts.transpose(-1, -2).to(dtype).contiguous()


def joined(planes: Tensor, complex_numbers: bool) -> Tensor:
    """The inverse of `planes`."""
    x = planes.transpose(-1, -2)
    return torch.complex(x[0].contiguous(), x[1].contiguous()) if complex_numbers else x[0].contiguous()


@dataclass(frozen=True)
class Modes:
    """Poles and residues, and everything about segments that does not depend on the input."""

    poles: Tensor  # (parts, N, D) float32
    residues: Tensor
    powers: Tensor  # (2, parts, N, D) double: of a whole segment, and of the last one
    starts_BT: Tensor | None
    alive_BS: Tensor
    skip: Tensor | None
    length: int
    segment: int

    @staticmethod
    def prepare(
        log_poles_DN: Tensor, residues_DN: Tensor, starts_BT: Tensor | None, skip: Tensor | None, length: int
    ) -> "Modes":
        segment = 8 if interpreting() else 128
        segments = -(-length // segment)
        wide = log_poles_DN.to(torch.complex128 if log_poles_DN.is_complex() else torch.float64)
        tail = length - (segments - 1) * segment
        powers = torch.stack([planes(torch.exp(wide * tokens), torch.float64) for tokens in (segment, tail)])
        alive_BS = torch.ones(1, segments, device=log_poles_DN.device)
        if starts_BT is not None:
            padded = torch.nn.functional.pad(starts_BT, (0, segments * segment - length))
            alive_BS = 1.0 - padded.unflatten(1, (segments, segment)).any(2).float()
        poles, residues = planes(torch.exp(wide), torch.float32), planes(residues_DN, torch.float32)
        return Modes(poles, residues, powers, as_bytes(starts_BT), alive_BS, skip, length, segment)

    @property
    def complex_numbers(self) -> bool:
        return self.poles.shape[0] == 2

    def grid(self, batch: int) -> tuple[int, int, int]:
        return -(-self.poles.shape[2] // self._block()), self.alive_BS.shape[1], batch

    def _block(self) -> int:
        return min(16, power_of_two(self.poles.shape[2])) if interpreting() else 32

    def options(self) -> dict[str, Any]:
        state_block = power_of_two(self.poles.shape[1])
        sizes = {"N_BLOCK": state_block, "D_BLOCK": self._block(), "TILE": 2 if interpreting() else 4}
        return sizes | {"COMPLEX": self.complex_numbers, "num_warps": max(1, min(8, state_block // 16))}

    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.length, self.poles.shape[2], self.poles.shape[1], self.segment, self.alive_BS.shape[1]

    def states(self, batch: int) -> Tensor:
        """Room for (parts, B, S, N, D)."""
        parts, modes, channels = self.poles.shape
        return self.poles.new_empty(parts, batch, self.alive_BS.shape[1], modes, channels)

    def carry(self, ends: Tensor, outermost: Tensor, *, reverse: bool = False) -> Tensor:
        """What enters each segment, given what each leaves from zero and what enters the outermost one."""
        carried = torch.empty_like(ends)
        size = self.poles[0].numel()
        block = min(256, power_of_two(size))
        triton_support.launch(
            pass_kernel, (-(-size // block), ends.shape[1]), ends, self.powers, self.alive_BS, outermost, carried,
            size, self.alive_BS.shape[1], batch_strides(self.alive_BS)[0], BLOCK=block, COMPLEX=self.complex_numbers,
            REVERSE=reverse, num_warps=4,
        )  # fmt: skip
        return carried

    def walk(self, u_BTD: Tensor, y_BTD: Tensor, entering: Tensor | None, *, output: bool, reverse: bool) -> Tensor:
        """Run all segments; returns what leaves them."""
        ends = self.states(u_BTD.shape[0])
        triton_support.launch(
            walk_kernel, self.grid(u_BTD.shape[0]), u_BTD, self.poles, self.residues, self.skip, self.starts_BT,
            entering, y_BTD, ends, *self.sizes(), batch_strides(u_BTD), batch_strides(self.starts_BT)[0],
            OUTPUT=output, REVERSE=reverse, **self.options(),
        )  # fmt: skip
        return ends

    def convolve(self, u_BTD: Tensor, y_BTD: Tensor, outermost: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """Write y (or, in reverse, du); returns what enters and what leaves each segment."""
        ends = self.walk(u_BTD, y_BTD, None, output=False, reverse=reverse)
        entering = self.carry(ends, outermost, reverse=reverse)
        return entering, self.walk(u_BTD, y_BTD, entering, output=True, reverse=reverse)

    def after_last(self, entering: Tensor, ends: Tensor) -> Tensor:
        """What leaves the last segment (parts, B, N, D), given what enters it and what leaves it from zero."""
        many = self.complex_numbers
        power_DN, state_BDN = joined(self.powers[1], many), joined(entering[:, :, -1].double(), many)
        kept_BDN = power_DN * state_BDN * self.alive_BS[:, -1, None, None]
        return planes(kept_BDN, torch.float32) + ends[:, :, -1]

    def last_slope(self, u_BTD: Tensor, entering: Tensor) -> Tensor:
        """The last state's derivative by the poles' logarithms (parts, B, N, D)."""
        ends = self._walk_slopes(u_BTD, u_BTD, entering, None, None)
        return self.after_last(self.carry(ends, torch.zeros_like(ends[:, :, 0])), ends)

    def slopes(self, u_BTD: Tensor, grad_BTD: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of residues and log poles (2, parts, N, D) from the outputs, and the last state's derivative."""
        ends = self._walk_slopes(u_BTD, grad_BTD, entering, None, None)
        slopes = self.carry(ends, torch.zeros_like(ends[:, :, 0]))
        sums = torch.stack((torch.empty_like(entering), torch.empty_like(entering)))
        ends = self._walk_slopes(u_BTD, grad_BTD, entering, slopes, sums)
        return sums.sum((2, 3)), ends[:, :, -1]

    def _walk_slopes(
        self, u_BTD: Tensor, grad_BTD: Tensor, entering: Tensor, slopes: Tensor | None, sums: Tensor | None
    ) -> Tensor:
        """Run all segments from zero, or from `slopes` to write `sums`; returns the derivatives that leave them."""
        ends = self.states(u_BTD.shape[0])
        triton_support.launch(
            mode_gradient_kernel, self.grid(u_BTD.shape[0]), u_BTD, grad_BTD, self.poles, self.residues,
            self.starts_BT, entering, slopes, sums, ends, *self.sizes(), batch_strides(u_BTD),
            batch_strides(grad_BTD), batch_strides(self.starts_BT)[0], OUTPUT=sums is not None, **self.options(),
        )  # fmt: skip
        return ends


class TritonModal(torch.autograd.Function):
    """See `modal_convolution`, which checks the arguments; states are float32 or complex64."""

    @staticmethod
    def forward(
        ctx: Any,
        u_BTD: Tensor,
        log_poles_DN: Tensor,
        residues_DN: Tensor,
        skip: Tensor | None,
        initial_BDN: Tensor,
        starts_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        u_BTD = rows_contiguous(u_BTD)
        modes = Modes.prepare(log_poles_DN, residues_DN, starts_BT, skip, u_BTD.shape[1])
        y_BTD = torch.empty(u_BTD.shape, dtype=u_BTD.dtype, device=u_BTD.device)
        _, ends = modes.convolve(u_BTD, y_BTD, planes(initial_BDN, torch.float32), reverse=False)
        ctx.save_for_backward(u_BTD, log_poles_DN, residues_DN, skip, initial_BDN, starts_BT)
        return y_BTD, joined(ends[:, :, -1], modes.complex_numbers)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_y, grad_final = rows_contiguous(grads[0]), planes(grads[1], torch.float32)
        u_BTD, log_poles_DN, residues_DN, skip, initial_BDN, starts_BT = ctx.saved_tensors
        modes = Modes.prepare(log_poles_DN, residues_DN, starts_BT, skip, u_BTD.shape[1])
        grad_u = torch.empty(u_BTD.shape, dtype=u_BTD.dtype, device=u_BTD.device)
        _, adjoints = modes.convolve(grad_y, grad_u, grad_final, reverse=True)
        ends = modes.walk(u_BTD, grad_u, None, output=False, reverse=False)
        entering = modes.carry(ends, planes(initial_BDN, torch.float32))
        (grad_residues, grad_poles), slope = modes.slopes(u_BTD, grad_y, entering)
        many = modes.complex_numbers
        from_final = joined(slope, many).conj() * joined(grad_final, many)
        return (
            grad_u,
            (joined(grad_poles, many) + from_final.sum(0)).to(log_poles_DN.dtype),
            joined(grad_residues, many).to(residues_DN.dtype),
            None if skip is None else (u_BTD.float() * grad_y.float()).sum((0, 1)).to(skip.dtype),
            joined(adjoints[:, :, 0], many).to(initial_BDN.dtype),
            None,
        )
