"""What an incoming state adds to the outputs, computed only while it is alive.

y_t = sum_n C_t[n] exp(A[n] c_t) state[n], with c_t the step sizes summed up to and with token t. With decays this falls
below the rounding of any output it is added to, at a token that depends on the channel and on the state. The tokens are
taken in bands that grow geometrically; at the start of each the pairs (channel, state) that are still alive are known
from c alone. Channels are sorted by how long they live and cut into groups, and a group computes only the states that
live in one of its channels.

Legend: B batch, T tokens, S tokens of a band, D channels, K living channels of a band, N states; in a piece of a band k
channels, m states and s tokens. Inside, tokens come last, so that the innermost loops stay long when few channels live.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..autograd import first_order
from ..documents import first_start
from ..living import negligible_exponent

_BLOCK = 32  # tokens; bands are a multiple of it
_GROUPS = 8  # most groups of channels in a band
_PIECE_ELEMENTS = 1 << 18  # states x channels x tokens of a piece: stays in cache, and outweighs the calls


@dataclass
class _Piece:
    """Some channels and states of a band, for some of its tokens."""

    channels: slice
    states_m: Tensor
    tokens: slice
    rate_mk1: Tensor
    sum_Bks: Tensor

    def decay(self, scratch: Tensor) -> Tensor:
        """exp(A c) of shape (B, m, k, s). exp2 is several times faster than exp in PyTorch's vectorised CPU code."""
        batch, channels, tokens = self.sum_Bks.shape
        shape = (batch, len(self.rate_mk1), channels, tokens)
        out = scratch[: math.prod(shape)].view(shape)
        return torch.mul(self.sum_Bks.unsqueeze(1), self.rate_mk1 * math.log2(math.e), out=out).exp2_()

    def of_states(self, x_BKN: Tensor) -> Tensor:
        """(B, m, k, 1) of a tensor over the band's channels and all states."""
        return x_BKN[:, self.channels].index_select(2, self.states_m).transpose(1, 2).unsqueeze(3)

    def of_projection(self, C_BNS: Tensor) -> Tensor:
        """(B, m, 1, s)."""
        return C_BNS[:, :, self.tokens].index_select(1, self.states_m).unsqueeze(2)


@dataclass
class Band:
    """Tokens start..stop and the channels that live at their begin, with the step sizes summed from the first token."""

    start: int
    stop: int
    order_K: Tensor
    alive_KN: Tensor
    rate_KN: Tensor
    sum_BKS: Tensor

    def pieces(self) -> Iterator[_Piece]:
        """All pairs that live, in pieces that stay in cache; few others."""
        batch, living, length = self.sum_BKS.shape
        work = batch * length * self.alive_KN.numel()
        groups = 1 if bool(self.alive_KN.all()) else min(_GROUPS, 1 + work // _PIECE_ELEMENTS)
        group = -(-living // groups)
        for first in range(0, living, group):
            channels = slice(first, min(first + group, living))
            states_m = self.alive_KN[channels].any(0).nonzero().squeeze(1)
            rate_mk1 = self.rate_KN[channels].index_select(1, states_m).t().unsqueeze(2)
            size = _tokens_of_a_piece(batch * rate_mk1.numel())
            for start in range(0, length, size):
                tokens = slice(start, min(start + size, length))
                yield _Piece(channels, states_m, tokens, rate_mk1, self.sum_BKS[:, channels, tokens])

    def projection(self, C_BTN: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, N, S): C of the band, zero for tokens at or after their sequence's first document start."""
        C_BSN = C_BTN[:, self.start : self.stop].to(self.rate_KN.dtype)
        if starts_BT is not None:
            tokens = torch.arange(self.start, self.stop, device=C_BTN.device)
            C_BSN = torch.where((tokens < first_start(starts_BT).unsqueeze(1)).unsqueeze(2), C_BSN, 0.0)
        return C_BSN.transpose(1, 2).contiguous()


def _take(x_BSD: Tensor, order_K: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, K, S). torch.gather is several times faster than an index on the last dimension."""
    x_BSK = torch.gather(x_BSD, 2, order_K.expand(*x_BSD.shape[:2], -1))
    return x_BSK.transpose(1, 2).to(dtype).contiguous()


def _put(part_BKS: Tensor, order_K: Tensor, out_BSD: Tensor) -> None:
    """The reverse of `_take`: write channels `order_K`."""
    out_BSD.scatter_(2, order_K.expand(*out_BSD.shape[:2], -1), part_BKS.transpose(1, 2).to(out_BSD.dtype))


def running_sum(x: Tensor) -> Tensor:
    """Cumulative sum over the last dimension: within blocks a triangular product, much faster than torch.cumsum."""
    length = x.shape[-1]
    blocks = length // _BLOCK
    if blocks < 2:
        return x.cumsum(-1)
    triangle = x.new_ones(_BLOCK, _BLOCK).triu_()
    rows = x[..., : blocks * _BLOCK].reshape(-1, _BLOCK)
    blocked = torch.mm(rows, triangle).view(*x.shape[:-1], blocks, _BLOCK)
    blocked[..., 1:, :].add_(blocked[..., :-1, -1:].cumsum(-2))
    whole = blocked.flatten(-2)
    if length % _BLOCK == 0:
        return whole
    return torch.cat((whole, x[..., blocks * _BLOCK :].cumsum(-1).add_(whole[..., -1:])), -1)


def _tokens_of_a_piece(elements: int) -> int:
    return max(_BLOCK, _PIECE_ELEMENTS // max(elements, 1) // _BLOCK * _BLOCK)


def _scratch(delta_BTD: Tensor, A_DN: Tensor) -> Tensor:
    """Room for any piece."""
    return A_DN.new_empty(max(_PIECE_ELEMENTS, _BLOCK * len(delta_BTD) * A_DN.numel()))


def living_bands(delta_BTD: Tensor, A_DN: Tensor, length: int) -> Iterator[Band]:
    """Bands of the first `length` tokens, each twice as far as the one before, until no state lives."""
    cutoff = negligible_exponent(A_DN.dtype)
    order_K = torch.arange(A_DN.shape[0], device=A_DN.device)
    sum_BK = torch.zeros_like(delta_BTD[:, :1].sum(1), dtype=A_DN.dtype)
    first_band = _tokens_of_a_piece(len(delta_BTD) * A_DN.numel())
    start = 0
    while start < length:
        stop = min(length, start + max(first_band, start))
        # The slowest sequence of the batch decides; a rate of zero or above keeps its pair alive for ever.
        exponent_KN = (sum_BK.unsqueeze(2) * A_DN[order_K]).amax(0)
        longest_first = exponent_KN.amax(1).argsort(descending=True)
        alive_KN = exponent_KN[longest_first] > -cutoff
        living = int(alive_KN.any(1).sum())
        if not living:
            return
        longest_first = longest_first[:living]
        order_K = order_K[longest_first]
        steps_BKS = _take(delta_BTD[:, start:stop], order_K, A_DN.dtype)
        sum_BKS = running_sum(steps_BKS).add_(sum_BK[:, longest_first].unsqueeze(2))
        yield Band(start, stop, order_K, alive_KN[:living], A_DN[order_K], sum_BKS)
        sum_BK = sum_BKS[:, :, -1]
        start = stop


def _reach(starts_BT: Tensor | None, length: int) -> int:
    """Tokens before the first document start of the sequence that has it last."""
    return length if starts_BT is None else int(first_start(starts_BT).max())


class Readout(torch.autograd.Function):
    """See `selective_scan_readout`; state and A already have the dtype of the computation."""

    @staticmethod
    def forward(
        ctx: Any, state_BDN: Tensor, delta_BTD: Tensor, A_DN: Tensor, C_BTN: Tensor, starts_BT: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(state_BDN, delta_BTD, A_DN, C_BTN, starts_BT)
        y_BTD = torch.zeros_like(delta_BTD)
        scratch = _scratch(delta_BTD, A_DN)
        for band in living_bands(delta_BTD, A_DN, _reach(starts_BT, delta_BTD.shape[1])):
            C_BNS, state_BKN = band.projection(C_BTN, starts_BT), state_BDN[:, band.order_K]
            y_BKS = torch.empty_like(band.sum_BKS)
            for piece in band.pieces():
                term_Bmks = piece.decay(scratch).mul_(piece.of_states(state_BKN)).mul_(piece.of_projection(C_BNS))
                y_BKS[:, piece.channels, piece.tokens] = term_Bmks.sum(1)
            _put(y_BKS, band.order_K, y_BTD[:, band.start : band.stop])
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        state_BDN, delta_BTD, A_DN, C_BTN, starts_BT = ctx.saved_tensors
        grad_state, grad_A, grad_C = torch.zeros_like(state_BDN), torch.zeros_like(A_DN), torch.zeros_like(C_BTN)
        scratches = (_scratch(delta_BTD, A_DN), _scratch(delta_BTD, A_DN))
        sums = []
        for band in living_bands(delta_BTD, A_DN, _reach(starts_BT, delta_BTD.shape[1])):
            C_BNS, state_BKN = band.projection(C_BTN, starts_BT), state_BDN[:, band.order_K]
            grad_BKS = _take(grad_BTD[:, band.start : band.stop], band.order_K, A_DN.dtype)
            parts = _band_backward(band, C_BNS, state_BKN, grad_BKS, scratches)
            grad_sum_BKS, grad_C_BNS, grad_state_BKN, grad_rate_KN = parts
            grad_C[:, band.start : band.stop] = grad_C_BNS.transpose(1, 2)
            grad_state[:, band.order_K] += grad_state_BKN
            grad_A[band.order_K] += grad_rate_KN
            sums.append((band.start, band.stop, band.order_K, grad_sum_BKS))
        if starts_BT is not None:
            hidden_BT = torch.arange(C_BTN.shape[1], device=C_BTN.device) >= first_start(starts_BT).unsqueeze(1)
            grad_C.masked_fill_(hidden_BT.unsqueeze(2), 0.0)
        return grad_state, _steps_gradient(sums, delta_BTD, A_DN.dtype), grad_A, grad_C, None


def _steps_gradient(sums: list[tuple[int, int, Tensor, Tensor]], delta_BTD: Tensor, dtype: torch.dtype) -> Tensor:
    """Each step size counts in its own token's sum and in all later ones, of later bands too."""
    grad_delta = torch.zeros_like(delta_BTD)
    later_BD = torch.zeros_like(delta_BTD[:, :1].sum(1), dtype=dtype)
    for start, stop, order_K, grad_sum_BKS in reversed(sums):
        grad_BKS = running_sum(grad_sum_BKS.flip(2)).flip(2).add_(later_BD[:, order_K].unsqueeze(2))
        _put(grad_BKS, order_K, grad_delta[:, start:stop])
        later_BD[:, order_K] = grad_BKS[:, :, 0]
    return grad_delta


def _band_backward(
    band: Band, C_BNS: Tensor, state_BKN: Tensor, grad_BKS: Tensor, scratches: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the summed steps (B, K, S), C (B, N, S), the state (B, K, N) and the rates (K, N) of one band."""
    grad_sum_BKS, grad_C_BNS = torch.empty_like(grad_BKS), torch.zeros_like(C_BNS)
    grad_state_BKN, grad_rate_KN = torch.zeros_like(state_BKN), torch.zeros_like(band.rate_KN)
    for piece in band.pieces():
        channels, tokens, states_m = piece.channels, piece.tokens, piece.states_m
        C_Bm1s, state_Bmk1 = piece.of_projection(C_BNS), piece.of_states(state_BKN)
        term = piece.decay(scratches[0]).mul_(grad_BKS[:, None, channels, tokens])
        product = torch.mul(term, state_Bmk1, out=scratches[1][: term.numel()].view(term.shape))
        grad_C_BNS[:, :, tokens].index_add_(1, states_m, product.sum(2))
        grad_state_BKN[:, channels].index_add_(2, states_m, term.mul_(C_Bm1s).sum(3).transpose(1, 2))
        product.mul_(C_Bm1s)
        grad_sum_BKS[:, channels, tokens] = torch.mul(product, piece.rate_mk1, out=term).sum(1)
        moment_mk = product.mul_(piece.sum_Bks.unsqueeze(1)).sum((0, 3))
        grad_rate_KN[channels].index_add_(1, states_m, moment_mk.t())
    return grad_sum_BKS, grad_C_BNS, grad_state_BKN, grad_rate_KN
