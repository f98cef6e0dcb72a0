"""A convolution by Fourier transforms of which every process makes its own shard's: no one holds a full-length row.

With a sequence cut into blocks of T tokens, X_s the transform of block s and H_j that of the filter's lags
[j T, (j + 1) T), for products of F >= 2 T values, H_{r-s} X_s adds to block r and, with what does not fit, to the block
behind it. That part is turned to the beginning by dividing by x^T, whose transform Z is of modulus one:

    G_j = H_j + H_{j-1} / Z        Y_r = sum over s <= r of G_{r-s} X_s        y_r = first T of Y_r

    transform the block that is here: F / 2 complex frequencies, as it is real
    exchange: every block, a P-th of the frequencies                     2 T numbers per channel and process
    multiply and add
    exchange: this block, every frequency                                2 T numbers
    transform back

The backward pass is the same with conjugate filters. Channels go in groups: what one group waits for travels while the
next one is transformed. Where shards are not blocks of one size, their tokens move to such blocks first: between even
shards of a length that P does not divide, a few.

Shapes: B batch, D channels, W tokens here, T tokens of a block, K frequencies, C frequencies of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.autograd import first_order
from ..kernels.long_convolution.transform import Transform
from .adjoint import with_adjoint
from .collectives import Pending, exchange
from .shard import SequenceShard, even_bounds

# Of channels. With more of them more is hidden, but every one costs two messages.
_GROUPS = 4


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) of a sequence, on at least two processes: its members."""

    shard: SequenceShard
    begin: int
    end: int

    @property
    def members(self) -> range:
        """Ranks, in order."""
        inner = [rank for rank, bound in enumerate(self.shard.bounds) if self.begin < bound < self.end]
        return range(inner[0] - 1, inner[-1] + 1)

    @property
    def block(self) -> int:
        """T."""
        return max(last - first for first, last in self.blocks)

    @property
    def shards(self) -> list[tuple[int, int]]:
        """The window's tokens on every member, in positions of the sequence."""
        bounds = self.shard.bounds
        return [(max(bounds[rank], self.begin), min(bounds[rank + 1], self.end)) for rank in self.members]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """What every member transforms: its shard where all of them between the first and the last are of one size
        and those are not larger; else equal parts."""
        sizes = [last - first for first, last in self.shards]
        if all(size == max(sizes) for size in sizes[1:-1]):
            return self.shards
        share = -(-(self.end - self.begin) // len(sizes))
        cuts = [min(self.begin + member * share, self.end) for member in range(len(sizes) + 1)]
        return list(pairwise(cuts))

    @property
    def place(self) -> int:
        """Where in this process's block its first token lies: the first member's are the last ones of theirs."""
        first, last = self.blocks[0]
        return self.block - (last - first) if self.shard.rank == self.members[0] else 0

    def lags(self) -> range:
        """The filter's block that this process transforms; empty if it is not a member."""
        member = self.shard.rank - self.members[0]
        return range(member * self.block, (member + 1) * self.block) if self.shard.rank in self.members else range(0)

    def slices(self, frequencies: int) -> list[range]:
        """The frequencies of every process of the shard; none of those that are not members."""
        bounds = even_bounds(frequencies, len(self.members))
        before, behind = self.members[0], self.shard.size - self.members[-1] - 1
        return [range(0)] * before + [range(*pair) for pair in pairwise(bounds)] + [range(0)] * behind


def convolve_window(u_BWD: Tensor, filter_DT: Tensor, window: Window) -> Tensor:
    """Causal convolution within one window of a length-sharded sequence; differentiable in both arguments.

    Every process of the shard takes part, those without a token of the window with empty tensors.

    Args:
        u_BWD: this shard's tokens of the window, float32 or float64.
        filter_DT: the filter at `window.lags()`, zeros at lags that lie beyond the window.

    Returns:
        (B, W, D).
    """
    moves = window.blocks != window.shards
    u_BWD = _moved(u_BWD, window, True) if moves else u_BWD
    y_BWD = _Convolution.apply(u_BWD, filter_DT, window)
    assert isinstance(y_BWD, Tensor)
    return _moved(y_BWD, window, False) if moves else y_BWD


class _Convolution(torch.autograd.Function):
    """Both passes go over the groups of channels three times, with a message of each group between two."""

    @staticmethod
    def forward(ctx: Any, u_BWD: Tensor, filter_DT: Tensor, window: Window) -> Tensor:
        ctx.window, plan = window, _Plan(window, u_BWD, "convolve.forward")
        blocks = [plan.send_block(u_BWD[..., group], filter_DT[group]) for group in plan.groups]
        products, saved = [], []
        for block in blocks:
            spectra = plan.receive_slices(block)
            inputs, filters = [x[:-1] for x in spectra], plan.folded([x[-1:] for x in spectra])
            saved += inputs + filters
            products.append(plan.send_slices(_convolved(filters, inputs)))
        ctx.save_for_backward(*saved)
        y_BWD = torch.empty_like(u_BWD, memory_format=torch.contiguous_format)
        for group, product in zip(plan.groups, products, strict=True):
            y_BWD[..., group] = plan.tokens(plan.receive_block(product))
        return y_BWD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_BWD,) = grads
        plan, saved = _Plan(ctx.window, grad_BWD, "convolve.backward"), iter(ctx.saved_tensors)
        blocks = [plan.send_block(grad_BWD[..., group]) for group in plan.groups]
        products = []
        for block in blocks:
            gradients = plan.receive_slices(block)
            inputs, filters = [next(saved) for _ in gradients], [next(saved) for _ in gradients]
            to_inputs = _correlated(filters, gradients)
            to_filters = plan.unfolded([taps.sum(0, keepdim=True) for taps in _correlated(inputs, gradients)])
            products.append(plan.send_slices([torch.cat(pair) for pair in zip(to_inputs, to_filters, strict=True)]))
        grad_u = torch.empty_like(grad_BWD, memory_format=torch.contiguous_format)
        grad_filter = grad_BWD.new_empty(grad_BWD.shape[2], len(ctx.window.lags()))
        for group, product in zip(plan.groups, products, strict=True):
            both_RDT = plan.receive_block(product)
            grad_u[..., group] = plan.tokens(both_RDT[:-1])
            grad_filter[group] = both_RDT[-1]
        return grad_u, grad_filter, None


def _convolved(filters: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """For every block r, the sum over s <= r of filters[r - s] inputs[s]."""
    return [_dot(filters[r::-1], inputs[: r + 1]) for r in range(len(inputs))]


def _correlated(earlier: list[Tensor], later: list[Tensor]) -> list[Tensor]:
    """The adjoint: for every distance j, the sum over s of conj(earlier[s]) later[s + j]."""
    conjugates = [x.conj().resolve_conj() for x in earlier]
    return [_dot(conjugates[: len(later) - j], later[j:]) for j in range(len(later))]


def _dot(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    total = ones[0] * others[0]
    for one, other in zip(ones[1:], others[1:], strict=True):
        total.addcmul_(one, other)
    return total


class _Plan:
    """The steps of one pass over a window, for this process. R rows are B ones of tokens and, or not, one of taps."""

    def __init__(self, window: Window, like_BWD: Tensor, motion: str) -> None:
        shard = self.shard = window.shard
        self.motion, self.members, self.lags = motion, window.members, window.lags()
        self.transform = Transform(2 * window.block, like_BWD.dtype, like_BWD.device)
        self.slices = window.slices(self.transform.frequencies)
        self.place = slice(window.place, window.place + like_BWD.shape[1])
        channels = like_BWD.shape[2]
        self.groups = [slice(*pair) for pair in pairwise(even_bounds(channels, min(channels, _GROUPS)))]
        mine = self.slices[shard.rank]
        self._back_C = self.transform.shift(-window.block)[mine.start : mine.stop]

    def send_block(self, x_BWD: Tensor, filter_DT: Tensor | None = None) -> Pending[list[Tensor]]:
        """Tokens in their place and, as one more row, taps: transformed, and a slice to each member."""
        batch, _, channels = x_BWD.shape
        rows = batch + (filter_DT is not None)
        x_RDT = x_BWD.new_zeros(rows, channels, len(self.lags))
        x_RDT[:batch, :, self.place] = x_BWD.transpose(1, 2)
        if filter_DT is not None:
            x_RDT[batch] = filter_DT
        here = bool(self.lags)
        x_RDK = self.transform.forward(x_RDT) if here else torch.complex(x_RDT, x_RDT)
        parts = [x_RDK[..., slice(part.start, part.stop) if here else slice(0)] for part in self.slices]
        mine = len(self.slices[self.shard.rank])
        return self._exchange(parts, [mine if rank in self.members else 0 for rank in range(self.shard.size)])

    def receive_slices(self, block: Pending[list[Tensor]]) -> list[Tensor]:
        """Of every member's block (R, D, C) the frequencies of this process."""
        arrived = block.wait()
        return [torch.view_as_complex(arrived[rank]) for rank in self.members]

    def send_slices(self, products: list[Tensor]) -> Pending[list[Tensor]]:
        """To every member its block's product."""
        nothing = products[0][..., :0]
        parts = [
            products[rank - self.members[0]] if rank in self.members else nothing for rank in range(self.shard.size)
        ]
        return self._exchange(parts, [len(part) if self.lags else 0 for part in self.slices])

    def receive_block(self, product: Pending[list[Tensor]]) -> Tensor:
        """(R, D, T) transformed back, (R, D, 0) where this process is no member."""
        x_RDK2 = torch.cat(product.wait(), dim=2)
        block = len(self.lags)
        return self.transform.backward(torch.view_as_complex(x_RDK2), block) if block else x_RDK2[..., 0]

    def tokens(self, x_RDT: Tensor) -> Tensor:
        """(R, W, D) from their place."""
        return x_RDT[..., self.place].transpose(1, 2)

    def folded(self, filters: list[Tensor]) -> list[Tensor]:
        """G of H."""
        return [filters[0], *(torch.addcmul(after, before, self._back_C) for before, after in pairwise(filters))]

    def unfolded(self, gradients: list[Tensor]) -> list[Tensor]:
        """The adjoint of `folded`."""
        forth_C = self._back_C.conj().resolve_conj()
        return [*(torch.addcmul(one, behind, forth_C) for one, behind in pairwise(gradients)), gradients[-1]]

    def _exchange(self, parts: list[Tensor], receive: list[int]) -> Pending[list[Tensor]]:
        """Complex parts (R, D, any); `receive` numbers from each process, with the real ones in a last dimension."""
        shapes = [(*parts[0].shape[:2], count, 2) for count in receive]
        return exchange([torch.view_as_real(part) for part in parts], shapes, self.shard, self.motion)


def _moved(x_BWD: Tensor, window: Window, forth: bool) -> Tensor:
    """Tokens from shards to blocks (`forth`), or back."""
    return with_adjoint(
        x_BWD,
        lambda x: _move(x, window, forth, "convolve.forward"),
        lambda grad: _move(grad, window, not forth, "convolve.backward"),
    )


def _move(x_BWD: Tensor, window: Window, forth: bool, motion: str) -> Tensor:
    shard, members = window.shard, window.members
    (batch, _, channels), nothing = x_BWD.shape, [(0, 0)]
    before, behind = nothing * members[0], nothing * (shard.size - members[-1] - 1)
    have, want = ([*before, *ranges, *behind] for ranges in (window.shards, window.blocks)[:: 1 if forth else -1])
    (first, last), (lowest, highest) = have[shard.rank], want[shard.rank]
    parts = [x_BWD[:, min(max(a, first), last) - first : max(min(b, last), first) - first] for a, b in want]
    counts = [max(0, min(b, highest) - max(a, lowest)) for a, b in have]
    return torch.cat(exchange(parts, [(batch, count, channels) for count in counts], shard, motion).wait(), dim=1)
