"""Groups of members that exchange tensors: processes of torch.distributed, or tiles that live as threads in processes.

A virtual group stands in for a process group in `collectives`, so that several parts of a split sequence can be
computed in one process exactly as several processes would (see canonical.py).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

WAIT_SECONDS = 600.0


class TileFailed(RuntimeError):
    """Another tile of this process failed; its own error is raised first."""


@dataclass(eq=False)
class VirtualGroup:
    """One tile's view of all tiles; stands in for a process group in `collectives`."""

    rank: int
    hub: TileHub

    @property
    def size(self) -> int:
        return self.hub.num_tiles

    def exchange(self, parts: Sequence[Tensor], receive_shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What every tile sends this one, given what this one sends every tile. All tiles call this together."""
        return self.hub.exchange(self.rank, list(parts), [tuple(shape) for shape in receive_shapes])

    def send(self, peer: int, x: Tensor) -> None:
        self.hub.send(self.rank, peer, x)

    def receive(self, peer: int, like: Tensor) -> Tensor:
        return self.hub.receive(peer, self.rank, like)


@dataclass(eq=False)
class TileHub:
    """The tiles of this process and their way to the others.

    Args:
        num_tiles: of the whole sequence; a multiple of the number of processes.
        group: the processes, in the order of their parts of the sequence; None for one process.
    """

    num_tiles: int
    group: dist.ProcessGroup | None
    _condition: threading.Condition = field(default_factory=threading.Condition)
    _waiting: dict[int, tuple[list[Tensor], list[tuple[int, ...]]]] = field(default_factory=dict)
    _arrived: dict[int, list[Tensor]] = field(default_factory=dict)
    _round: int = 0
    _failed: bool = False
    _mail: dict[tuple[int, int], queue.Queue[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        processes = dist.get_world_size(self.group) if self.group is not None else 1
        if self.num_tiles % processes:
            raise ValueError(f"{self.num_tiles} tiles cannot be spread over {processes} processes evenly")
        self._process = dist.get_rank(self.group) if self.group is not None else 0
        self._per_process = self.num_tiles // processes
        self._processes = processes
        for source in range(self.num_tiles):
            for target in self.tiles:
                self._mail[source, target] = queue.Queue()

    @property
    def tiles(self) -> range:
        """This process's tiles."""
        return range(self._process * self._per_process, (self._process + 1) * self._per_process)

    def exchange(self, tile: int, parts: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        with self._condition:
            turn = self._round
            self._waiting[tile] = (parts, shapes)
            if len(self._waiting) == self._per_process:
                self._arrived = self._deliver()
                self._waiting = {}
                self._round += 1
                self._condition.notify_all()
            else:
                done = self._condition.wait_for(lambda: self._round > turn or self._failed, WAIT_SECONDS)
                if self._failed or not done:
                    raise TileFailed(f"tile {tile} waits in vain for the other tiles of its process")
            return self._arrived[tile]

    def fail(self) -> None:
        """Release the tiles that wait for one that will not come."""
        with self._condition:
            self._failed = True
            self._condition.notify_all()

    def _deliver(self) -> dict[int, list[Tensor]]:
        """Parts to their tiles: between processes as one message each, ordered by (sending tile, receiving tile)."""
        example = self._waiting[self.tiles[0]][0][0]
        outgoing, incoming_sizes = [], []
        for process in range(self._processes):
            theirs = range(process * self._per_process, (process + 1) * self._per_process)
            flats = [self._waiting[mine][0][other].reshape(-1) for mine in self.tiles for other in theirs]
            outgoing.append(torch.cat(flats))
            sizes = [torch.Size(self._waiting[mine][1][other]).numel() for other in theirs for mine in self.tiles]
            incoming_sizes.append(sizes)
        if self.group is None:
            incoming = outgoing
        else:
            buffer = example.new_empty(sum(sum(sizes) for sizes in incoming_sizes))
            dist.all_to_all_single(
                buffer,
                torch.cat(outgoing),
                [sum(sizes) for sizes in incoming_sizes],
                [part.numel() for part in outgoing],
                group=self.group,
            )
            incoming = list(buffer.split([sum(sizes) for sizes in incoming_sizes]))
        arrived: dict[int, list[Tensor]] = {mine: [] for mine in self.tiles}
        for process, sizes in enumerate(incoming_sizes):
            pieces = iter(incoming[process].split(sizes))
            for other in range(process * self._per_process, (process + 1) * self._per_process):
                for mine in self.tiles:
                    # a clone, so that no later arithmetic depends on where in a message a part lay
                    arrived[mine].append(next(pieces).clone().view(self._waiting[mine][1][other]))
        return arrived

    def send(self, source: int, target: int, x: Tensor) -> None:
        process = target // self._per_process
        if process == self._process:
            self._mail[source, target].put(x.clone())
        else:
            dist.send(x.contiguous(), group=self.group, group_dst=process, tag=source * self.num_tiles + target)

    def receive(self, source: int, target: int, like: Tensor) -> Tensor:
        process = source // self._per_process
        if process == self._process:
            try:
                return self._mail[source, target].get(timeout=WAIT_SECONDS)
            except queue.Empty as error:
                raise TileFailed(f"tile {target} waits in vain for tile {source}") from error
        buffer = torch.empty_like(like).contiguous()
        dist.recv(buffer, group=self.group, group_src=process, tag=source * self.num_tiles + target)
        return buffer

    def fold(self, per_tile: dict[int, Tensor]) -> Tensor:
        """((t_0 + t_1) + t_2) + ... over all tiles of all processes, the same on every process."""
        total: Tensor | None = None
        if self._process:
            total = torch.empty_like(per_tile[self.tiles[0]])
            dist.recv(total, group=self.group, group_src=self._process - 1)
        for tile in self.tiles:
            total = per_tile[tile].clone() if total is None else total + per_tile[tile]
        assert total is not None
        if self.group is not None and self._process < self._processes - 1:
            dist.send(total, group=self.group, group_dst=self._process + 1)
        if self.group is not None:
            dist.broadcast(total, group=self.group, group_src=self._processes - 1)
        return total


Group = dist.ProcessGroup | VirtualGroup


def group_size(group: Group | None) -> int:
    """Members of a group; 1 for None."""
    if group is None:
        return 1
    return group.size if isinstance(group, VirtualGroup) else dist.get_world_size(group)


def group_rank(group: Group | None) -> int:
    """This member's place in a group; 0 for None."""
    if group is None:
        return 0
    return group.rank if isinstance(group, VirtualGroup) else dist.get_rank(group)
