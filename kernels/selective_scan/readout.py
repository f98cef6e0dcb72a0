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
import torch.nn.functional as F
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


@dataclass
class Steps:
    """Step sizes, made of what is stored only where they are read."""

    delta_BTD: Tensor
    delta_bias: Tensor | None
    softplus: bool

    def take(self, start: int, stop: int, order_K: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, K, S)."""
        steps_BKS = _take(self.delta_BTD[:, start:stop], order_K, dtype)
        if self.delta_bias is not None:
            steps_BKS += self.delta_bias[order_K].unsqueeze(1)
        return F.softplus(steps_BKS) if self.softplus else steps_BKS


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


def living_bands(steps: Steps, A_DN: Tensor, length: int) -> Iterator[Band]:
    """Bands of the first `length` tokens, each twice as far as the one before, until no state lives."""
    cutoff = negligible_exponent(A_DN.dtype)
    order_K = torch.arange(A_DN.shape[0], device=A_DN.device)
    batch = len(steps.delta_BTD)
    sum_BK = A_DN.new_zeros(batch, len(A_DN))
    first_band = _tokens_of_a_piece(batch * A_DN.numel())
    start = 0
    while start < length and batch:
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
        sum_BKS = running_sum(steps.take(start, stop, order_K, A_DN.dtype)).add_(sum_BK[:, longest_first].unsqueeze(2))
        yield Band(start, stop, order_K, alive_KN[:living], A_DN[order_K], sum_BKS)
        sum_BK = sum_BKS[:, :, -1]
        start = stop


def _reach(starts_BT: Tensor | None, length: int) -> int:
    """Tokens before the first document start of the sequence that has it last."""
    if starts_BT is None or not len(starts_BT):
        return length
    return int(first_start(starts_BT).max())


class Enter(torch.autograd.Function):
    """`y_BTD`, to which is added, in place, what a state that enters gives the outputs; see stages.py.

    State and A have the dtype of the computation. Its backward gives the gradient of that state only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        entering_BDN: Tensor,
        delta_BTD: Tensor,
        A_DN: Tensor,
        C_BTN: Tensor,
        delta_bias: Tensor | None,
        starts_BT: Tensor | None,
        before_BKD: Tensor,
        softplus: bool,
    ) -> Tensor:
        ctx.save_for_backward(delta_BTD, A_DN, C_BTN, delta_bias, starts_BT)
        ctx.softplus = softplus
        scratch = _scratch(delta_BTD, A_DN)
        for band in living_bands(Steps(delta_BTD, delta_bias, softplus), A_DN, _reach(starts_BT, delta_BTD.shape[1])):
            C_BNS, state_BKN = band.projection(C_BTN, starts_BT), entering_BDN[:, band.order_K]
            outputs_BSD = y_BTD[:, band.start : band.stop]
            y_BKS = _take(outputs_BSD, band.order_K, A_DN.dtype)
            for piece in band.pieces():
                term_Bmks = piece.decay(scratch).mul_(piece.of_states(state_BKN)).mul_(piece.of_projection(C_BNS))
                y_BKS[:, piece.channels, piece.tokens] += term_Bmks.sum(1)
            _put(y_BKS, band.order_K, outputs_BSD)
        ctx.mark_dirty(y_BTD)
        return y_BTD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        delta_BTD, A_DN, C_BTN, delta_bias, starts_BT = ctx.saved_tensors
        grad_state_BDN = A_DN.new_zeros(len(delta_BTD), *A_DN.shape)
        scratch = _scratch(delta_BTD, A_DN)
        steps = Steps(delta_BTD, delta_bias, ctx.softplus)
        for band in living_bands(steps, A_DN, _reach(starts_BT, delta_BTD.shape[1])):
            C_BNS = band.projection(C_BTN, starts_BT)
            grad_BKS = _take(grad_BTD[:, band.start : band.stop], band.order_K, A_DN.dtype)
            grad_BKN = A_DN.new_zeros(len(delta_BTD), *band.rate_KN.shape)
            for piece in band.pieces():
                term = piece.decay(scratch).mul_(grad_BKS[:, None, piece.channels, piece.tokens])
                part_Bkm = term.mul_(piece.of_projection(C_BNS)).sum(3).transpose(1, 2)
                grad_BKN[:, piece.channels].index_add_(2, piece.states_m, part_Bkm)
            grad_state_BDN[:, band.order_K] += grad_BKN
        return grad_BTD, grad_state_BDN, *(None,) * 7
