"""The canonical mode: losses and gradients that are bitwise the same for every sequence degree.

A sequence is always cut into the same number of tiles, and every tile is computed exactly as a process of that many
would compute it, wherever it lies: a process that holds several runs them as threads that speak through a virtual
group. Sums over tiles are left folds in tile order. So the arithmetic, down to the last rounding, is a function of
the number of tiles alone. It costs small tiles and whole parameters on every process: for finding faults, not speed.

Every motion goes through `collectives`, which is all that a virtual group has to stand in for.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .groups import TileFailed, TileHub, VirtualGroup
from .ledger import CommunicationLedger
from .shard import SequenceShard, even_bounds

Result = TypeVar("Result")


class CanonicalModel:
    """A model whose loss and gradients are computed tile by tile.

    Args:
        model: with whole (not sharded) parameters, the same on every process.
        num_tiles: into which every sequence is cut; a multiple of the sequence degree.
        group: the processes that share every sequence; None for one.
    """

    def __init__(self, model: nn.Module, num_tiles: int, group: dist.ProcessGroup | None) -> None:
        self.model = model
        self.num_tiles = num_tiles
        self.hub = TileHub(num_tiles, group)
        self._replicas = {tile: _replica(model) for tile in self.hub.tiles}

    def shard(self, tile: int, length: int, documents: object, ledger: CommunicationLedger) -> SequenceShard:
        """One tile's part of sequences of `length` tokens."""
        group = VirtualGroup(tile, self.hub)
        return SequenceShard.split(length, group, documents, token_group=group, ledger=ledger)

    def run(
        self,
        function: Callable[[nn.Module, Tensor, Tensor, SequenceShard], Result],
        tokens_BT: Tensor,
        targets_BT: Tensor,
        length: int,
        documents: object,
        ledger: CommunicationLedger,
    ) -> Result:
        """`function(model, tokens, targets, shard)` of every tile of this process; the first tile's result.

        Args:
            tokens_BT, targets_BT: this process's contiguous part of the sequences.
        """
        bounds = even_bounds(length, self.num_tiles)
        first = bounds[self.hub.tiles[0]]

        def compute(tile: int) -> Result:
            here = slice(bounds[tile] - first, bounds[tile + 1] - first)
            replica = self._replicas[tile]
            _copy_buffers(self.model, replica)
            shard = self.shard(tile, length, documents, ledger)
            return function(replica, tokens_BT[:, here].clone(), targets_BT[:, here].clone(), shard)

        return self._on_every_tile(compute)

    def end_step(self) -> None:
        """The models' `end_step`: every tile adapts by what all tiles saw, and the model becomes what they are."""
        self._on_every_tile(lambda tile: self._replicas[tile].end_step())  # type: ignore[operator]
        _copy_buffers(self._replicas[self.hub.tiles[0]], self.model)

    def _on_every_tile(self, compute: Callable[[int], Result]) -> Result:
        """Run as threads, which may speak to each other; the first tile's result."""
        results: dict[int, Result] = {}
        errors: dict[int, BaseException] = {}
        grad_enabled = torch.is_grad_enabled()

        def work(tile: int) -> None:
            try:
                # tiles wait for each other in their backwards too, for which a GPU has one thread unless told otherwise
                with torch.set_grad_enabled(grad_enabled), torch.autograd.set_multithreading_enabled(False):
                    results[tile] = compute(tile)
            except BaseException as error:
                errors[tile] = error
                self.hub.fail()

        threads = [threading.Thread(target=work, args=(tile,), daemon=True) for tile in self.hub.tiles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors.values() if not isinstance(e, TileFailed)), next(iter(errors.values())))
        return results[self.hub.tiles[0]]

    def collect_gradients(self) -> None:
        """Set the gradients of the model's trained parameters to the fold of the tiles', and forget those."""
        parameters = _trained(self.model)
        flats = {}
        for tile, replica in self._replicas.items():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in _trained(replica)]
            flats[tile] = torch.cat([grad.reshape(-1) for grad in grads])
            replica.zero_grad(set_to_none=True)
        total = self.hub.fold(flats)
        for parameter, grad in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.clone().view_as(parameter)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _replica(model: nn.Module) -> nn.Module:
    """A copy of the model over the same storage, with gradients of its own."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Replicas have buffers of their own: each adapts them in `end_step`."""
    with torch.no_grad():
        for theirs, ours in zip(source.buffers(), target.buffers(), strict=True):
            ours.copy_(theirs)
