"""The state that enters a sequence, on its way through the chunks, for as long as it is alive.

At the chunk that begins at token t it is exp(t log_pole) times what it was. Each channel is followed as long as its
slowest mode lives, and to its sequence's first document start.

Legend: as in portable.py; K living channels of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..living import negligible_exponent
from .pieces import Piece, Plan
from .portable import modes_of, real_parts, widest


def lifetimes(log_poles_DN: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(D,) int64: tokens after which less than epsilon to the power 1.5 of any mode is left; at most `length`."""
    slowest_D = (log_poles_DN.real if log_poles_DN.is_complex() else log_poles_DN).detach().double().amax(1)
    tokens_D = negligible_exponent(dtype) / (-slowest_D).clamp_min(1e-30)
    return tokens_D.clamp(max=length).ceil().long()


@dataclass(frozen=True)
class Arrival:
    """`state_DBN` and `log_poles_DN` in double precision; `lives_D` in tokens.

    `grad_DBN`, `late_DBN`: what `collect` has found: the gradient of the state, and that of the poles per state.
    """

    plan: Plan
    state_DBN: Tensor
    log_poles_DN: Tensor
    lives_D: Tensor
    grad_DBN: Tensor
    late_DBN: Tensor

    @staticmethod
    def of(plan: Plan, state_BDN: Tensor, log_poles_DN: Tensor) -> Arrival:
        state_DBN = widest(state_BDN).transpose(0, 1)
        lives_D = lifetimes(log_poles_DN, plan.reach, plan.dtype)
        sums = torch.zeros_like(state_DBN), torch.zeros_like(state_DBN)
        return Arrival(plan, state_DBN, widest(log_poles_DN), lives_D, *sums)

    @cached_property
    def powers_DMN(self) -> Tensor:
        """From a piece's first token to each of its chunks, in the dtype of the computation."""
        chunks = max(piece.chunks for piece in self.plan.pieces)
        tokens_M = self.plan.chunk * torch.arange(chunks, dtype=torch.float64, device=self.lives_D.device)
        powers_DMN = torch.exp(self.log_poles_DN.unsqueeze(1) * tokens_M.unsqueeze(1))
        return powers_DMN.to(self.plan.dtype.to_complex() if powers_DMN.is_complex() else self.plan.dtype)

    def living(self, piece: Piece) -> Tensor | slice | None:
        """The channels in which the state is alive when the piece begins; None if it is in none."""
        if piece.start >= self.plan.reach:
            return None
        alive_D = self.lives_D > piece.start
        if bool(alive_D.all()):
            return slice(None)
        return alive_D.nonzero().squeeze(1) if bool(alive_D.any()) else None

    def join(self, before: Tensor, piece: Piece) -> Tensor:
        """The states before the piece's chunks (D, R, S), given the buffer of those from zero."""
        entering_DRS, living = self.plan.state_rows(before, piece), self.living(piece)
        if living is None:
            return entering_DRS
        powers_KMN = self.powers_DMN[living, : piece.chunks]
        first_KBN = (self._decay(piece, living) * self.state_DBN[living]).to(powers_KMN.dtype)
        states_KBMN = self._seen(piece, powers_KMN.unsqueeze(1) * first_KBN.unsqueeze(2))
        states_KRS = real_parts(states_KBMN).flatten(1, 2)
        return entering_DRS + states_KRS if isinstance(living, slice) else entering_DRS.index_add(0, living, states_KRS)

    def collect(self, grad_DRS: Tensor, piece: Piece) -> None:
        """Take in the gradient of what `join` gave."""
        living = self.living(piece)
        if living is None:
            return
        grad_KBMN = modes_of(self.plan.by_sequence(grad_DRS[living]), self.state_DBN.is_complex())
        powers_KMN = self.powers_DMN[living, : piece.chunks].conj()
        arrived_KBMN = self._seen(piece, powers_KMN.unsqueeze(1) * grad_KBMN)
        tokens_M1 = self.plan.chunk * torch.arange(piece.chunks, device=grad_DRS.device).unsqueeze(1)
        plain_KBN, late_KBN = arrived_KBMN.sum(2), (arrived_KBMN * tokens_M1).sum(2)
        decay_K1N = self._decay(piece, living).conj()
        self.grad_DBN[living] += decay_K1N * plain_KBN
        self.late_DBN[living] += decay_K1N * (piece.start * widest(plain_KBN) + late_KBN)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the state (B, D, N) and of the poles' logarithms (D, N), in double precision."""
        return self.grad_DBN.transpose(0, 1), (self.late_DBN * self.state_DBN.conj()).sum(1)

    def _decay(self, piece: Piece, living: Tensor | slice) -> Tensor:
        """(K, 1, N), from the sequence's first token to the piece's."""
        return torch.exp(self.log_poles_DN[living] * piece.start).unsqueeze(1)

    def _seen(self, piece: Piece, states_KBMN: Tensor) -> Tensor:
        """Zero, in place, from where a document has begun before the chunk."""
        first_B = self.plan.first_B
        if first_B is not None:
            begins_M = piece.start + self.plan.chunk * torch.arange(piece.chunks, device=first_B.device)
            states_KBMN *= (begins_M <= first_B.unsqueeze(1)).unsqueeze(2)
        return states_KBMN
