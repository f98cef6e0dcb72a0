"""What layers that adapt by other means than gradients see in a step, summed over its parts and over all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..parallel import SequenceShard, global_sum


class StepSum:
    """A sum over the forward passes in training since the last `take`.

    A pass counts once its gradient comes back: a step may be computed in parts (`language_model.Part`), and a pass that
    is only computed again for its backward pass must not count twice.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._shard: SequenceShard | None = None

    def add(self, seen: Tensor, layer: nn.Module, output: Tensor, shard: SequenceShard) -> None:
        """`seen` by `layer` on this process when it made `output`; nothing outside training."""
        if not (layer.training and output.requires_grad):
            return
        seen = seen.detach()

        def count(_: Tensor) -> None:
            self._sum, self._shard = seen if self._sum is None else self._sum + seen, shard

        output.register_hook(count)

    @torch.no_grad()
    def take(self) -> Tensor | None:
        """The sum over all processes, which begins anew; None where nothing was seen on any. Call it on all alike."""
        if self._sum is None or self._shard is None:
            return None
        total = global_sum(self._sum, self._shard)
        self._sum = self._shard = None
        return total
