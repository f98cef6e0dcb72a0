"""RWKV-7's recurrence in PyTorch: triangular systems inside chunks, dense transitions between them.

Within a chunk of Q tokens let G(s, t) be the product of diag(w) after token s up to and with t. Then
    S_t = S_0 G(0, t) + sum_{s <= t} (u_s b_s^T + v_s k_s^T) G(s, t)   with   u_t = S_{t-1} a_t,
so that the u of a chunk solve a unit triangular system, (I - A_ab) U = A S_0^T + A_ak V, where A_ab[t, s] is
a_t . G(s, t-1) b_s for s < t (the WY form of products of matrices that are diagonal plus rank one). All chunks are
solved together, for S_0 and V apart; then S_out = S_in P + C runs from chunk to chunk.

Decays between two tokens are exponentials of differences. Where a chunk's decay is moderate, they are split into a
factor for each of both tokens, relative to the middle of the chunk; otherwise, so that nothing overflows, each pair of
tokens has its own.

Legend: B batch, T tokens, H heads, N head width, M chunks, Q tokens of a chunk; where nothing else is said, tensors of
some chunks are (M, B, H, Q, N). A head's state S is (values, keys).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..state_space_dual.portable import causal_pairs, chunked, documents_before

CHUNK = 32
PAIRWISE_CHUNK = 8
# exp of half of it is far inside the range of single precision, also when multiplied with ordinary numbers
MODERATE = 60.0


def by_head(x_BTHN: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(M, B, H, Q, N), the last chunk filled up with tokens that do nothing."""
    return chunked(x_BTHN.to(dtype), chunk).permute(1, 0, 3, 2, 4)


def by_token(x_MBHQN: Tensor, length: int) -> Tensor:
    """(B, T, H, N), the inverse of `by_head`."""
    return x_MBHQN.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def is_moderate(log_w_BTHN: Tensor, chunk: int) -> bool:
    """Whether no chunk of the sequence decays by more than exp(-MODERATE). Waits for a GPU."""
    if not log_w_BTHN.numel():
        return True
    return float(chunked(log_w_BTHN.detach().float(), chunk).sum(2).abs().amax()) <= MODERATE


@dataclass(frozen=True)
class Decays:
    """What lies between the tokens of some chunks.

    Attributes:
        since: sum of log w since the chunk's begin, with the token itself.
        count_BMQ: see `documents_before`; None where no document begins.
        moderate: whether decays may be split into factors.
    """

    since: Tensor
    count_BMQ: Tensor | None
    moderate: bool

    @staticmethod
    def of(log_w: Tensor, starts_BT: Tensor | None, moderate: bool) -> Decays:
        return Decays(log_w.cumsum(3), documents_before(starts_BT, log_w.shape[3]), moderate)

    def entering(self, x: Tensor, log_since: Tensor) -> Tensor:
        """x G(0, t): how a token meets the state that enters its chunk; `log_since` may leave the token itself out."""
        met = x * log_since.exp()
        return met if self.count_BMQ is None else met * _of_tokens(self.count_BMQ == 0, x.dtype)

    def leaving(self, x: Tensor) -> Tensor:
        """x G(t, end): what a token's key has become at the chunk's end."""
        left = x * (self.since[..., -1:, :] - self.since).exp()
        if self.count_BMQ is not None:
            left = left * _of_tokens(self.count_BMQ == self.count_BMQ[..., -1:], x.dtype)
        return left

    def whole(self) -> Tensor:
        """G(0, end), (M, B, H, N)."""
        whole = self.since[..., -1, :].exp()
        if self.count_BMQ is not None:
            whole = whole * _of_tokens(self.count_BMQ == 0, whole.dtype)[..., -1, :]
        return whole

    def scores(self, left: Tensor, log_since: Tensor, b: Tensor, k: Tensor, diagonal: int) -> tuple[Tensor, Tensor]:
        """(..., t, s): left_t . G(s, t) b_s, and with k, for s up to t + `diagonal`; zero otherwise."""
        if self.moderate:
            middle = self.since[..., self.since.shape[-2] // 2, :].unsqueeze(-2)
            factor = (middle - self.since).exp()
            both = (left * (log_since - middle).exp()) @ torch.cat((b * factor, k * factor), -2).mT
        else:
            between = (log_since.unsqueeze(-2) - self.since.unsqueeze(-3)).clamp_max(0.0).exp()
            between = left.unsqueeze(-2) * between
            both = torch.cat([torch.einsum("...sn,...tsn->...ts", right, between) for right in (b, k)], -1)
        with_b, with_k = both.split(left.shape[-2], -1)
        if self.count_BMQ is None:
            return with_b.tril(diagonal), with_k.tril(diagonal)
        pairs = causal_pairs(left.shape[-2], self.count_BMQ, left.device).tril(diagonal).transpose(0, 1).unsqueeze(2)
        return torch.where(pairs, with_b, 0.0), torch.where(pairs, with_k, 0.0)


def _of_tokens(mask_BMQ: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, B or 1, 1, Q, 1)"""
    return mask_BMQ.to(dtype).transpose(0, 1)[:, :, None, :, None]


def solve(k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_w: Tensor, decays: Decays) -> tuple[Tensor, Tensor, Tensor]:
    """Everything of some chunks that asks for neither outputs nor the state that enters.

    Returns:
        answers: (M, B, H, Q, 2 N); with its halves X and U, u_t = S_0 x_t + u'_t is what the state answers to a_t.
        transition, added: P and C (M, B, H, N, N), S_out = S_in P + C.
    """
    width, before = k.shape[-1], decays.since - log_w
    with_b, with_k = decays.scores(a, before, b, k, -1)
    right = torch.cat((decays.entering(a, before), with_k @ v), -1)
    answers = torch.linalg.solve_triangular(-with_b, right, upper=False, unitriangular=True)
    turned, added = (answers.mT @ decays.leaving(b)).split(width, -2)
    return answers, torch.diag_embed(decays.whole()) + turned, added + v.mT @ decays.leaving(k)


def ask(r: Tensor, k: Tensor, v: Tensor, b: Tensor, answers: Tensor, decays: Decays) -> tuple[Tensor, Tensor]:
    """(what a chunk's own tokens give its outputs, the questions q to the state S that enters: y_t += S q_t)."""
    with_b, with_k = decays.scores(r, decays.since, b, k, 0)
    reads, own = (with_b @ answers).split(r.shape[-1], -1)
    return own + with_k @ v, reads + decays.entering(r, decays.since)


def segment(
    chunk: int, moderate: bool, state_BHNN: Tensor, sequences: Sequence[Tensor], starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment of `walk`."""
    length = sequences[0].shape[1]
    chunk = min(chunk, max(length, 1))
    r, log_w, k, v, a, b = (by_head(x, chunk, state_BHNN.dtype) for x in sequences)
    decays = Decays.of(log_w, starts_BT, moderate)
    answers, transition, added = solve(k, v, a, b, log_w, decays)
    entering = []
    for P, C in zip(transition.unbind(0), added.unbind(0), strict=True):
        entering.append(state_BHNN)
        state_BHNN = state_BHNN @ P + C
    y, questions = ask(r, k, v, b, answers, decays)
    if entering:
        y = y + questions @ torch.stack(entering).mT
    return by_token(y, length).to(sequences[0].dtype), state_BHNN
