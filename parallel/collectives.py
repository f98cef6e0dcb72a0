"""The only file that moves tensors between processes: a thin, counted layer over torch.distributed.

Everything here is plain data movement without gradients; the motions (`halo`, `reshard`, `prefix_state`, ...)
build their forward and backward from it. All messages are asynchronous: a call returns at once with a `Pending`,
whose `wait` blocks (and counts the seconds).

Neighbour messages are sent as an uneven all-to-all in which most parts are empty: backends skip empty parts, no
order of sends and receives can deadlock, and under gloo it is ten times faster than send/recv.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import CommunicationError, timeout_of, verify_exchange
from .groups import Group, VirtualGroup, group_rank, group_size
from .shard import SequenceShard

Result = TypeVar("Result")


@dataclass
class Pending(Generic[Result]):
    """A message under way; `wait` returns what arrived."""

    work: dist.Work | None
    finish: Callable[[], Result]
    shard: SequenceShard
    motion: str

    def wait(self) -> Result:
        """Block until the message has arrived; the seconds are counted as waiting."""
        if self.work is not None:
            begun = time.perf_counter()
            try:
                with self.shard.ledger.waiting(self.motion, self.shard.layer):
                    self.work.wait()
            except RuntimeError as error:
                raise _lost(self.shard, self.motion, time.perf_counter() - begun, error) from error
        return self.finish()


def _lost(shard: SequenceShard, motion: str, waited: float, error: RuntimeError) -> CommunicationError:
    limit = timeout_of(shard.group if shard.group is not None else shard.expert_group)
    return CommunicationError(
        f"{motion} in layer {shard.layer or '?'}: rank {shard.rank} of {shard.size} lost its peers after waiting "
        f"{waited:.1f} s (a message may take {limit}): {str(error).splitlines()[0]}"
    )


def _begun(start: Callable[[], dist.Work | None], shard: SequenceShard, motion: str) -> dist.Work | None:
    """A message set going; one to a process that is known to be dead fails here already."""
    try:
        return start()
    except RuntimeError as error:
        raise _lost(shard, motion, 0.0, error) from error


def exchange(
    parts: Sequence[Tensor], receive_shapes: Sequence[Sequence[int]], shard: SequenceShard, motion: str
) -> Pending[list[Tensor]]:
    """Send `parts[p]` to process p of the sequence group and receive a tensor of `receive_shapes[p]` from each.

    Parts may be empty and of different shapes; all share dtype and device. A process's part for itself is handed
    over without being counted.
    """
    return exchange_in(shard.group, parts, receive_shapes, shard, motion)


def exchange_in(
    group: Group | None,
    parts: Sequence[Tensor],
    receive_shapes: Sequence[Sequence[int]],
    shard: SequenceShard,
    motion: str,
) -> Pending[list[Tensor]]:
    """`exchange` over any group (the expert group, say)."""
    if group is None:
        return Pending(None, lambda: [parts[0]], shard, motion)
    send_sizes = [part.numel() for part in parts]
    receive_sizes = [torch.Size(shape).numel() for shape in receive_shapes]
    if isinstance(group, VirtualGroup):
        _record(group, send_sizes, receive_sizes, parts[0].element_size(), shard, motion)
        arrived = group.exchange(parts, receive_shapes)
        return Pending(None, lambda: arrived, shard, motion)
    outgoing = parts[0].new_empty(sum(send_sizes))
    for part, place in zip(parts, outgoing.split(send_sizes), strict=True):
        place.view(part.shape).copy_(part)
    pending = _exchange_flat(group, outgoing, send_sizes, receive_sizes, shard, motion)

    def finish() -> list[Tensor]:
        pieces = pending.finish().split(receive_sizes)
        return [piece.view(*shape) for piece, shape in zip(pieces, receive_shapes, strict=True)]

    return Pending(pending.work, finish, shard, motion)


def exchange_rows(
    group: Group | None,
    rows_MD: Tensor,
    send_rows: list[int],
    receive_rows: list[int],
    shard: SequenceShard,
    motion: str,
) -> Pending[Tensor]:
    """Of consecutive rows, `send_rows[p]` to process p; all that arrive, in the senders' order. Nothing is copied."""
    if group is None or isinstance(group, VirtualGroup):
        shapes = [(count, *rows_MD.shape[1:]) for count in receive_rows]
        parts = exchange_in(group, rows_MD.split(send_rows), shapes, shard, motion)
        return Pending(parts.work, lambda: torch.cat(parts.finish()), shard, motion)
    width = rows_MD.shape[1:].numel()
    send_sizes, receive_sizes = [count * width for count in send_rows], [count * width for count in receive_rows]
    pending = _exchange_flat(group, rows_MD.reshape(-1), send_sizes, receive_sizes, shard, motion)
    return Pending(pending.work, lambda: pending.finish().view(-1, *rows_MD.shape[1:]), shard, motion)


def _exchange_flat(
    group: dist.ProcessGroup,
    outgoing: Tensor,
    send_sizes: list[int],
    receive_sizes: list[int],
    shard: SequenceShard,
    motion: str,
) -> Pending[Tensor]:
    """Consecutive numbers of one tensor to every process; all that arrive."""
    _record(group, send_sizes, receive_sizes, outgoing.element_size(), shard, motion)
    if shard.checked:
        verify_exchange(group, outgoing.dtype, send_sizes, receive_sizes, motion)
    incoming = outgoing.new_empty(sum(receive_sizes))
    work = _begun(
        lambda: dist.all_to_all_single(incoming, outgoing, receive_sizes, send_sizes, group=group, async_op=True),
        shard,
        motion,
    )

    def finish() -> Tensor:
        assert outgoing is not None  # kept alive until the message has left
        return incoming

    return Pending(work, finish, shard, motion)


def _record(
    group: Group, send_sizes: list[int], receive_sizes: list[int], width: int, shard: SequenceShard, motion: str
) -> None:
    """What goes to and comes from others, of numbers of `width` bytes."""
    me = group_rank(group)
    sent, received = sum(send_sizes) - send_sizes[me], sum(receive_sizes) - receive_sizes[me]
    shard.ledger.record(motion, shard.layer, sent=width * sent, received=width * received)


def gather(x: Tensor, shard: SequenceShard, motion: str) -> Pending[Tensor]:
    """All processes' tensors of the same shape, stacked in rank order: (P, *x.shape)."""
    if shard.group is None:
        return Pending(None, lambda: x.unsqueeze(0), shard, motion)
    others = x.numel() * x.element_size() * (shard.size - 1)
    shard.ledger.record(motion, shard.layer, sent=others, received=others)
    if isinstance(shard.group, VirtualGroup):
        stacked = torch.stack(shard.group.exchange([x] * shard.size, [x.shape] * shard.size))
        return Pending(None, lambda: stacked, shard, motion)
    if shard.checked:
        sizes = [x.numel()] * shard.size
        verify_exchange(shard.group, x.dtype, sizes, sizes, motion)
    source = x.reshape(-1)
    gathered = source.new_empty(shard.size * source.numel())
    group = shard.group
    work = _begun(lambda: dist.all_gather_single(gathered, source, group=group, async_op=True), shard, motion)
    return Pending(work, lambda: gathered.view(shard.size, *x.shape), shard, motion)


def verify_chain(like: Tensor, shard: SequenceShard, motion: str, *, reverse: bool = False) -> None:
    """Where shards are checked: that every process will send a tensor shaped like `like` to the next, and expects one
    of the same size from the one before. Every process calls this; it is for `send_to` and `receive_from`."""
    if not shard.checked or not isinstance(shard.group, dist.ProcessGroup):
        return
    step, numbers = -1 if reverse else 1, like.numel() * (2 if like.is_complex() else 1)
    sizes = [[numbers if rank == shard.rank + way else 0 for rank in range(shard.size)] for way in (step, -step)]
    verify_exchange(shard.group, like.real.dtype if like.is_complex() else like.dtype, sizes[0], sizes[1], motion)


def send_to(peer: int, x: Tensor, shard: SequenceShard, motion: str) -> Pending[Tensor]:
    """Send `x` to one process of the sequence group, which must call `receive_from`; for chains of processes."""
    assert shard.group is not None
    flat = torch.view_as_real(x).contiguous() if x.is_complex() else x.contiguous()
    shard.ledger.record(motion, shard.layer, sent=flat.numel() * flat.element_size(), received=0)
    if isinstance(shard.group, VirtualGroup):
        shard.group.send(peer, flat)
        return Pending(None, lambda: flat, shard, motion)
    group = shard.group
    work = _begun(lambda: dist.isend(flat, group=group, group_dst=peer), shard, motion)
    # the buffer must live until the message has left
    return Pending(work, lambda: flat, shard, motion)


def receive_from(peer: int, like: Tensor, shard: SequenceShard, motion: str) -> Pending[Tensor]:
    """Receive a tensor shaped like `like` from one process of the sequence group."""
    assert shard.group is not None
    buffer = torch.empty_like(torch.view_as_real(like) if like.is_complex() else like).contiguous()
    shard.ledger.record(motion, shard.layer, sent=0, received=buffer.numel() * buffer.element_size())

    def arrived() -> Tensor:
        return torch.view_as_complex(buffer) if like.is_complex() else buffer

    if isinstance(shard.group, VirtualGroup):
        buffer = shard.group.receive(peer, buffer)
        return Pending(None, arrived, shard, motion)
    group = shard.group
    work = _begun(lambda: dist.irecv(buffer, group=group, group_src=peer), shard, motion)
    return Pending(work, arrived, shard, motion)


def all_reduce(x: Tensor, group: Group | None, shard: SequenceShard, motion: str) -> Tensor:
    """Sum of `x` over `group`; a new tensor."""
    if group_size(group) == 1:
        return x.clone()
    if isinstance(group, VirtualGroup):
        members = group.exchange([x.detach()] * group.size, [x.shape] * group.size)
        return functools.reduce(torch.add, members)
    total = x.detach().clone(memory_format=torch.contiguous_format)
    bytes_moved = total.numel() * total.element_size()
    shard.ledger.record(motion, shard.layer, sent=bytes_moved, received=bytes_moved)
    work = _begun(lambda: dist.all_reduce(total, group=group, async_op=True), shard, motion)
    return Pending(work, lambda: total, shard, motion).wait()
