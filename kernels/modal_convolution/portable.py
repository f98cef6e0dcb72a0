"""Modal convolution in PyTorch: Toeplitz products inside chunks, states between them.

Inside a chunk of Q tokens the filter is a Q x Q Toeplitz matrix per channel, and all chunks of all sequences are rows
of one batched product. The state that a chunk adds is a second product, what an entering state adds a third; between
chunks runs the recurrence with p^Q. Powers of the poles are taken in double precision from their logarithms, and the
states between chunks are carried in double precision, so that phases survive a million tokens. The filter is never
longer than a chunk.

A chunk in which documents begin is given one row for each of them, the rest of the row zero; nothing crosses rows.

Legend: B batch, T tokens, D channels, N modes, M chunks, Q tokens of a chunk, S real numbers of a state (N, or 2N when
complex), R rows of a product (B x M, and one more for each further document of a chunk).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import dense_gradient

CHUNK = 64


@dataclass(frozen=True)
class ModalTables:
    """Everything about the filter that a chunk of Q tokens needs, differentiable in poles and residues."""

    toeplitz_DQQ: Tensor  # [s, t]: filter at lag t - s; the direct term belongs to lag zero
    enter_DQS: Tensor  # [s]: p^(Q-1-s), what token s leaves in the state at the chunk's end
    leave_DSQ: Tensor  # [t]: R p^(t+1), what the entering state adds to output t
    power_DN: Tensor  # p^Q, in double precision
    tail_power_DN: Tensor  # p^(T mod Q), for the last chunk

    def tensors(self) -> tuple[Tensor, ...]:
        return self.toeplitz_DQQ, self.enter_DQS, self.leave_DSQ, self.power_DN, self.tail_power_DN


def widest(x: Tensor) -> Tensor:
    """The tensor in double precision, real or complex."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def real_parts(x: Tensor) -> Tensor:
    """(..., N) as real numbers (..., S): unchanged, or real and imaginary parts in turn."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def modes_of(x: Tensor, complex_numbers: bool) -> Tensor:
    """The inverse of `real_parts`; a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if complex_numbers else x


def powers(log_poles_DN: Tensor, count: int) -> Tensor:
    """(D, N, count): p^0, p^1, ... in double precision."""
    exponents = torch.arange(count, dtype=torch.float64, device=log_poles_DN.device)
    return torch.exp(widest(log_poles_DN).unsqueeze(-1) * exponents)


def leaving(residues_DN: Tensor, powers_DNQ: Tensor, dtype: torch.dtype) -> Tensor:
    """(D, S, Q): products with the real parts of a state give Re sum_n R p^t x."""
    weighted_DNQ = widest(residues_DN).unsqueeze(-1) * powers_DNQ
    # Re(w x) = Re w Re x - Im w Im x
    return real_parts(weighted_DNQ.conj().transpose(1, 2)).transpose(1, 2).to(dtype)


def modal_tables(
    log_poles_DN: Tensor, residues_DN: Tensor, skip: Tensor | None, chunk: int, tail: int, dtype: torch.dtype
) -> ModalTables:
    """Tables for chunks of `chunk` tokens, the last of which has `tail` tokens (0: it is whole)."""
    powers_DNQ = powers(log_poles_DN, chunk + 1)
    weighted_DNQ = widest(residues_DN).unsqueeze(-1) * powers_DNQ[..., :chunk]
    filter_DQ = weighted_DNQ.sum(1)
    filter_DQ = filter_DQ.real if filter_DQ.is_complex() else filter_DQ
    if skip is not None:
        filter_DQ = filter_DQ + F.pad(skip.unsqueeze(1), (0, chunk - 1))
    filter_DQ = filter_DQ.to(dtype)
    lags = torch.arange(chunk, device=filter_DQ.device)
    lags = lags - lags.unsqueeze(1)
    toeplitz_DQQ = filter_DQ[:, lags.clamp_min(0)].masked_fill(lags < 0, 0.0)
    enter_DQS = real_parts(powers_DNQ[..., :chunk].flip(-1).transpose(1, 2)).to(dtype)
    leave_DSQ = leaving(residues_DN, powers_DNQ[..., 1:], dtype)
    return ModalTables(toeplitz_DQQ, enter_DQS, leave_DSQ, powers_DNQ[..., chunk], powers_DNQ[..., tail])


@dataclass(frozen=True)
class Documents:
    """How the documents of a segment lie in its chunks."""

    from_before_RQ: Tensor  # tokens of the document that was there before the chunk
    mask_RQ: Tensor  # tokens of the row's document; further documents of chunks come after the first B*M rows
    further_chunk: Tensor  # the chunk of each further row
    last_row: Tensor  # the row of each chunk's last document
    unbroken_R: Tensor  # chunks in which no document begins

    @staticmethod
    def of(starts_RQ: Tensor) -> "Documents":
        count_RQ = starts_RQ.long().cumsum(1)
        label_RQ = count_RQ - starts_RQ[:, :1].long()
        last_R = label_RQ[:, -1]
        chunks = torch.arange(len(starts_RQ), device=starts_RQ.device)
        further_chunk = chunks.repeat_interleave(last_R)
        begin_R = len(starts_RQ) + last_R.cumsum(0) - last_R
        row = torch.arange(len(further_chunk), device=starts_RQ.device) + len(starts_RQ)
        further_label = row - begin_R[further_chunk] + 1
        mask = torch.cat((label_RQ == 0, label_RQ[further_chunk] == further_label.unsqueeze(1)))
        last_row = torch.where(last_R > 0, begin_R + last_R - 1, chunks)
        return Documents(count_RQ == 0, mask, further_chunk, last_row, count_RQ[:, -1] == 0)

    @property
    def last_RQ(self) -> Tensor:
        """Tokens of each chunk's last document, which alone reaches the state at its end."""
        return self.mask_RQ[self.last_row]

    def apart(self, x_DRQ: Tensor) -> Tensor:
        """A row for each document of each chunk; the adjoint of `together`."""
        return torch.cat((x_DRQ, x_DRQ[:, self.further_chunk]), 1) * self.mask_RQ

    def together(self, x_DRQ: Tensor) -> Tensor:
        """A row for each chunk again."""
        x_DRQ = x_DRQ * self.mask_RQ
        first = x_DRQ[:, : len(self.unbroken_R)]
        return first.index_add(1, self.further_chunk, x_DRQ[:, first.shape[1] :])


def modal_segment(
    state_DBN: Tensor, sequences: Sequence[Tensor], parameters: Sequence[Tensor], starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One segment of `walk`: whole chunks, or at the sequence's end a last one that is shorter."""
    (u_BTD,), (toeplitz_DQQ, enter_DQS, leave_DSQ, power_DN, tail_power_DN) = sequences, parameters
    batch, length, channels = u_BTD.shape
    chunk, dtype = toeplitz_DQQ.shape[-1], toeplitz_DQQ.dtype
    tail = length % chunk
    chunks = -(-length // chunk)
    padded = chunks * chunk
    u_DBT = F.pad(u_BTD.permute(2, 0, 1).to(dtype), (0, padded - length))
    # batched products are far faster on dense rows, in the backward too
    u_DRQ = u_DBT.reshape(channels, batch * chunks, chunk).contiguous()
    documents = None
    if starts_BT is not None:
        starts_BT = F.pad(starts_BT.expand(batch, -1), (0, padded - length))
        documents = Documents.of(starts_BT.reshape(-1, chunk))
        u_DRQ = documents.apart(u_DRQ)
    y_DRQ = torch.bmm(u_DRQ, toeplitz_DQQ)
    added_DRS = torch.bmm(u_DRQ, enter_DQS)
    if tail:  # the padding would let the state decay; count the last chunk's tokens from its true end
        last = torch.bmm(u_DRQ[..., :tail], enter_DQS[:, chunk - tail :])
        is_last_R = torch.arange(u_DRQ.shape[1], device=u_DRQ.device) % chunks == chunks - 1
        if documents is not None:
            is_last_R[batch * chunks :] = is_last_R[documents.further_chunk]
        added_DRS = torch.where(is_last_R[:, None], last, added_DRS)
    if documents is not None:
        y_DRQ = documents.together(y_DRQ)
        added_DRS = added_DRS[:, documents.last_row]
    keep = None if documents is None else documents.unbroken_R.view(batch, chunks)
    added_MDBN = by_chunk(added_DRS.view(channels, batch, chunks, added_DRS.shape[2]), state_DBN.is_complex())
    entering_MDBN, state_DBN = pass_states(
        state_DBN, added_MDBN, [power_DN] * (chunks - 1) + [tail_power_DN if tail else power_DN], keep
    )
    entering_DRS = real_parts(entering_MDBN.permute(1, 2, 0, 3).flatten(1, 2)).to(dtype)
    if documents is None:
        y_DRQ = torch.baddbmm(y_DRQ, entering_DRS, leave_DSQ)
    else:
        y_DRQ = y_DRQ + torch.bmm(entering_DRS, leave_DSQ) * documents.from_before_RQ
    y_BTD = dense_gradient(y_DRQ).reshape(channels, batch, padded)[..., :length].permute(1, 2, 0)
    return y_BTD.to(u_BTD.dtype), state_DBN


def by_chunk(x_DBMS: Tensor, complex_numbers: bool) -> Tensor:
    """(M, D, B, N) in double precision."""
    x_MDBS = x_DBMS.permute(2, 0, 1, 3).to(torch.float64, memory_format=torch.contiguous_format)
    return modes_of(x_MDBS, complex_numbers)


def pass_states(
    state_DBN: Tensor, added_MDBN: Tensor, powers_DN: Sequence[Tensor], keep_BM: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """The states that enter each chunk (M, D, B, N), and the last one: x' = power x + added, with each chunk's power.

    `keep_BM`: False where a chunk forgets the state. `reverse`: from the last chunk to the first, as adjoints go.
    """
    entering = []
    chunks = range(len(added_MDBN))
    added = added_MDBN.unbind(0)
    for m in reversed(chunks) if reverse else chunks:
        entering.append(state_DBN)
        factor = powers_DN[m].unsqueeze(1)
        if keep_BM is not None:
            factor = factor * keep_BM[:, m, None]
        state_DBN = torch.addcmul(added[m], factor, state_DBN)
    if not entering:
        return torch.empty_like(added_MDBN), state_DBN
    return torch.stack(entering[::-1] if reverse else entering), state_DBN
