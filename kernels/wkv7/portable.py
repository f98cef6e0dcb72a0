"""RWKV-7's recurrence in PyTorch: triangular systems inside chunks, dense transitions between them.

Within a chunk of Q tokens let G(s, t) be the product of diag(w) after token s up to and with t. Then
    S_t = S_0 G(0, t) + sum_{s <= t} (u_s b_s^T + v_s k_s^T) G(s, t)   with   u_t = S_{t-1} a_t,
so that the u of a chunk solve a unit triangular system, (I - A_ab) U = A S_0^T + A_ak V, where A_ab[t, s] is
a_t . G(s, t-1) b_s for s < t (the WY form of products of matrices that are diagonal plus rank one). All chunks are
solved together, for S_0 and V apart; then S_out = S_in P + C runs from chunk to chunk.

Decays between two tokens are exponentials of differences. Where a chunk's decay is moderate, they are split into a
factor for each of both tokens, relative to the middle of the chunk; otherwise, so that nothing overflows, each pair of
tokens has its own.

Legend: B batch, T tokens, H heads, N head width, M chunks, Q tokens of a chunk. A head's state S is (values, keys).
"""

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
    """(B, H, M, Q, N)."""
    return chunked(x_BTHN.to(dtype), chunk).permute(0, 3, 1, 2, 4)


def is_moderate(log_w_BTHN: Tensor, chunk: int) -> bool:
    """Whether no chunk of the sequence decays by more than exp(-MODERATE)."""
    if not log_w_BTHN.numel():
        return True
    return float(chunked(log_w_BTHN.detach().float(), chunk).sum(2).abs().amax()) <= MODERATE


def _scores(left: Tensor, left_log: Tensor, right: Tensor, right_log: Tensor, moderate: bool) -> Tensor:
    """(..., t, s): sum_n left[t] right[s] exp(left_log[t] - right_log[s]); pairs with s after t are meaningless."""
    if moderate:
        middle = right_log[..., right_log.shape[-2] // 2, :].unsqueeze(-2)
        return (left * (left_log - middle).exp()) @ (right * (middle - right_log).exp()).mT
    between = (left_log.unsqueeze(-2) - right_log.unsqueeze(-3)).clamp_max(0.0).exp()
    return torch.einsum("...tn,...sn,...tsn->...ts", left, right, between)


@dataclass(frozen=True)
class _Chunks:
    """What the tokens' transitions need, chunk by chunk: (B, H, M, Q, N) and (..., Q, Q)."""

    log_since: Tensor  # sum of log w since the chunk's begin, with the token itself
    log_before: Tensor  # without it
    reads: Tensor  # a G(0, t-1): how u_t reads the entering state
    b_left: Tensor  # b G(t, end)
    keep: Tensor  # G(0, end), (B, H, M, N)
    system: Tensor  # I - A_ab
    count_BMQ: Tensor | None
    moderate: bool

    @staticmethod
    def of(log_w: Tensor, a: Tensor, b: Tensor, starts_BT: Tensor | None, moderate: bool) -> "_Chunks":
        chunk = log_w.shape[3]
        log_since = log_w.cumsum(3)
        log_before = log_since - log_w
        count_BMQ = documents_before(starts_BT, chunk)
        pairs = causal_pairs(chunk, count_BMQ, log_w.device).tril(-1)
        scores = _scores(a, log_before, b, log_since, moderate)
        system = torch.eye(chunk, dtype=a.dtype, device=a.device) - _masked(scores, pairs)
        reads, keep = a * log_before.exp(), log_since[..., -1, :].exp()
        if count_BMQ is not None:
            first = _of_tokens(count_BMQ == 0, a.dtype)
            reads, keep = reads * first, keep * first[..., -1, :]
        chunks = _Chunks(log_since, log_before, reads, b, keep, system, count_BMQ, moderate)
        return _Chunks(log_since, log_before, reads, chunks.left(b), keep, system, count_BMQ, moderate)

    def left(self, x: Tensor) -> Tensor:
        """x G(t, end): what the token's key has become at the chunk's end."""
        left = x * (self.log_since[..., -1:, :] - self.log_since).exp()
        if self.count_BMQ is not None:
            left = left * _of_tokens(self.count_BMQ == self.count_BMQ[..., -1:], x.dtype)
        return left

    def solve(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)

    def transition(self, solved_reads: Tensor) -> Tensor:
        """P (B, H, M, N, N)."""
        return torch.diag_embed(self.keep) + solved_reads.mT @ self.b_left


def _of_tokens(mask_BMQ: Tensor, dtype: torch.dtype) -> Tensor:
    return mask_BMQ.to(dtype)[:, None, :, :, None]


def _masked(scores: Tensor, pairs: Tensor) -> Tensor:
    """Scores where the pair counts; pairs are (Q, Q) or (B or 1, M, Q, Q)."""
    return torch.where(pairs if pairs.dim() == 2 else pairs.unsqueeze(1), scores, 0.0)


def segment(
    chunk: int, moderate: bool, state_BHNN: Tensor, sequences: Sequence[Tensor], starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment of `walk`."""
    batch, length, heads, width = sequences[0].shape
    chunk = min(chunk, max(length, 1))
    r, log_w, k, v, a, b = (by_head(x, chunk, state_BHNN.dtype) for x in sequences)
    chunks = _Chunks.of(log_w, a, b, starts_BT, moderate)
    pairs = causal_pairs(chunk, chunks.count_BMQ, r.device)
    a_k = _masked(_scores(a, chunks.log_before, k, chunks.log_since, moderate), pairs.tril(-1))
    r_b = _masked(_scores(r, chunks.log_since, b, chunks.log_since, moderate), pairs)
    r_k = _masked(_scores(r, chunks.log_since, k, chunks.log_since, moderate), pairs)
    solved_reads, solved_values = chunks.solve(torch.cat((chunks.reads, a_k @ v), -1)).split(width, -1)
    added = solved_values.mT @ chunks.b_left + v.mT @ chunks.left(k)
    transition = chunks.transition(solved_reads)
    entering = []
    for P, C in zip(transition.unbind(2), added.unbind(2), strict=True):
        entering.append(state_BHNN)
        state_BHNN = state_BHNN @ P + C
    reads_r = r * chunks.log_since.exp()
    if chunks.count_BMQ is not None:
        reads_r = reads_r * _of_tokens(chunks.count_BMQ == 0, r.dtype)
    y = r_b @ solved_values + r_k @ v
    if entering:
        y = y + (reads_r + r_b @ solved_reads) @ torch.stack(entering, 2).mT
    y_BTHN = y.permute(0, 2, 3, 1, 4).reshape(batch, chunk * y.shape[2], heads, width)[:, :length]
    return y_BTHN.to(sequences[0].dtype), state_BHNN


def transition_segment(
    chunk: int, moderate: bool, matrix_BHNN: Tensor, sequences: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """One segment of `walk` for the product of transitions, transposed: matrix' = P^T matrix. No outputs."""
    length = sequences[0].shape[1]
    chunk = min(chunk, max(length, 1))
    log_w, a, b = (by_head(x, chunk, matrix_BHNN.dtype) for x in sequences)
    chunks = _Chunks.of(log_w, a, b, None, moderate)
    for P in chunks.transition(chunks.solve(chunks.reads)).unbind(2):
        matrix_BHNN = P.mT @ matrix_BHNN
    return matrix_BHNN.new_zeros(matrix_BHNN.shape[0], length, 0), matrix_BHNN
