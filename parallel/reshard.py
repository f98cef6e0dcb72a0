"""Reshard: from a slice of the length with all channels to all the length with a slice of the channels, and back.

Uneven sizes are fine; several tensors travel in one message, and what needs none of them may be computed meanwhile. B
batch, T tokens here, L all tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from .collectives import Pending, exchange
from .flight import Flight, arrive, depart
from .shard import SequenceShard, even_bounds


@overload
def reshard(x: Tensor, shard: SequenceShard, to: str, channels: int | None = None) -> Tensor: ...
@overload
def reshard(
    x: Sequence[Tensor], shard: SequenceShard, to: str, channels: int | Sequence[int | None] | None = None
) -> tuple[Tensor, ...]: ...


def reshard(
    x: Tensor | Sequence[Tensor],
    shard: SequenceShard,
    to: str,
    channels: int | Sequence[int | None] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Exchange length for channels between the processes of a sequence, differentiably.

    Args:
        x: one tensor or several of one dtype, sent in one message. For `to="channels"` (B, T, D, ...), dimension 2
            is split; for `to="length"` (B, L, D of this rank, ...).
        to: "channels": (B, T, D, ...) -> (B, L, D_r, ...), rank r holding channels `even_bounds(D, P)[r:r+2]`;
            "length": the inverse.
        channels: for `to="length"`, the number D of all channels (per tensor, or for all); by default P times the
            channels here, which is right when P divides D.

    Bytes per process: T x D x (P - 1) / P each way, for every tensor.

    Raises:
        ValueError: another `to`, fewer channels than processes, or sizes that do not match the shard.
    """
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    result = _begin(tensors, shard, to, channels)()
    return result[0] if isinstance(x, Tensor) else result


def begin_reshard(x: Tensor, shard: SequenceShard, to: str) -> Callable[[], Tensor]:
    """`reshard` in two halves: the message leaves now, and calling the result awaits it. In the backward pass the
    gradient travels between the same two places."""
    finish = _begin((x,), shard, to, None)
    return lambda: finish()[0]


def _begin(
    tensors: tuple[Tensor, ...], shard: SequenceShard, to: str, channels: int | Sequence[int | None] | None
) -> Callable[[], tuple[Tensor, ...]]:
    if to not in ("channels", "length"):
        raise ValueError(f"reshard to {to!r}: choose 'channels' or 'length'")
    tokens = shard.local_length if to == "channels" else shard.length
    for tensor in tensors:
        if tensor.shape[1] != tokens:
            raise ValueError(f"reshard to {to}: x has {tensor.shape[1]} tokens, expected {tokens}")
    if shard.size == 1:
        return lambda: tensors
    flight = _Flight(shard, to, _totals(tensors, shard, to, channels))
    anchor = depart(flight, *tensors)
    return lambda: arrive(flight, anchor)


def _totals(
    tensors: tuple[Tensor, ...], shard: SequenceShard, to: str, channels: int | Sequence[int | None] | None
) -> tuple[int, ...]:
    """The number of channels over all processes, per tensor."""
    given = list(channels) if isinstance(channels, Sequence) else [channels] * len(tensors)
    totals = []
    for tensor, total in zip(tensors, given, strict=True):
        here = tensor.shape[2]
        if to == "channels":
            total = here
        elif total is None:
            total = here * shard.size
        if total < shard.size:
            raise ValueError(f"{total} channels cannot be split over {shard.size} processes")
        bounds = even_bounds(total, shard.size)
        if to == "length" and here != bounds[shard.rank + 1] - bounds[shard.rank]:
            raise ValueError(f"rank {shard.rank} holds {here} channels; {total} over {shard.size} gives another number")
        totals.append(total)
    return tuple(totals)


class _Flight(Flight):
    """Tensors on their way to the other split, and their gradients back to this one."""

    def __init__(self, shard: SequenceShard, to: str, totals: tuple[int, ...]) -> None:
        self._shard, self._to, self._totals = shard, to, totals
        self._message: Pending[tuple[Tensor, ...]] | None = None

    def send(self, *tensors: Tensor) -> None:
        self._message = _send(tensors, self._shard, self._to, self._totals, "reshard.forward")

    def send_back(self, *gradients: Tensor) -> None:
        back = "length" if self._to == "channels" else "channels"
        self._message = _send(gradients, self._shard, back, self._totals, "reshard.backward")

    def land(self) -> tuple[Tensor, ...]:
        assert self._message is not None
        arrived, self._message = self._message.wait(), None
        return arrived

    def land_back(self) -> tuple[Tensor, ...]:
        return self.land()


def _send(
    tensors: tuple[Tensor, ...], shard: SequenceShard, to: str, totals: tuple[int, ...], motion: str
) -> Pending[tuple[Tensor, ...]]:
    """One all-to-all for all tensors: a process's part is the tensors' blocks for it, one after another."""
    bounds = [even_bounds(total, shard.size) for total in totals]
    sequence = shard.bounds
    ranks = range(shard.size)

    def outgoing(tensor: Tensor, channel: tuple[int, ...], peer: int) -> Tensor:
        if to == "channels":
            return tensor[:, :, channel[peer] : channel[peer + 1]]
        return tensor[:, sequence[peer] : sequence[peer + 1]]

    def incoming_shape(tensor: Tensor, channel: tuple[int, ...], peer: int) -> tuple[int, ...]:
        owner, slice_ = (peer, shard.rank) if to == "channels" else (shard.rank, peer)
        length, width = sequence[owner + 1] - sequence[owner], channel[slice_ + 1] - channel[slice_]
        return (tensor.shape[0], length, width, *tensor.shape[3:])

    pairs = list(zip(tensors, bounds, strict=True))
    blocks = [[outgoing(t, c, peer) for t, c in pairs] for peer in ranks]
    parts = [row[0] if len(row) == 1 else torch.cat([block.reshape(-1) for block in row]) for row in blocks]
    shapes = [[incoming_shape(t, c, peer) for t, c in pairs] for peer in ranks]
    sizes = [[torch.Size(shape).numel() for shape in row] for row in shapes]
    pending = exchange(parts, [(sum(row),) for row in sizes], shard, motion)
    dim = 1 if to == "channels" else 2

    def joined() -> tuple[Tensor, ...]:
        pieces = [flat.split(row) for flat, row in zip(pending.finish(), sizes, strict=True)]
        return tuple(
            torch.cat([pieces[peer][i].view(shapes[peer][i]) for peer in ranks], dim=dim) for i in range(len(tensors))
        )

    return Pending(pending.work, joined, shard, motion)
