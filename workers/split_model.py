"""The experiment's model over the processes of a mesh: losses and gradients of a batch.

Either FSDP shards the parameters and every process computes with its slice of the sequences, or, for results that do
not depend on the number of processes (`train.canonical`), every process has the whole model and computes tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import Batch
from ..models import DropoutKey, Losses, Part, build_model
from ..parallel import CanonicalModel, CommunicationLedger, Mesh, SequenceShard, clip_gradients
from .experiment import Experiment
from .sharded_model import make_sharded_model
from .trained_parameters import freeze, still_buffers, unchanged


class SplitModel:
    """Every process of the mesh has one and calls it alike.

    Attributes:
        module: the model, with this process's part of the parameters.
        canonical: it in tiles, None without `train.canonical`.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh, ledger: CommunicationLedger) -> None:
        self.experiment, self.mesh, self.ledger = experiment, mesh, ledger
        self._compared = False  # whether the processes have compared their messages, as they do in the first step
        self.canonical: CanonicalModel | None = None
        if tiles := experiment.train.canonical:
            model = build_model(experiment.model, seed=experiment.seed, dtype=experiment.train.parameter_dtype)
            self.module = model.to(mesh.device)
            freeze(self.module, experiment.train)
            self.canonical = CanonicalModel(self.module, tiles, mesh.sequence_group)
        else:
            self.module = make_sharded_model(experiment, mesh, ledger=ledger)
        self._still = still_buffers(self.module, experiment.train)

    def losses(self, batch: Batch, step: int, *, backward: bool = False) -> Losses:
        """The losses of a batch, the same on every process; with `backward` this process's gradients too.

        `step`: made so far; it decides what is dropped out.
        """
        parts = self.experiment.train.accumulate
        part = Part(1 / parts, batch.num_targets) if parts > 1 else None
        rows = len(batch.tokens_BT) // parts
        starts = range(0, len(batch.tokens_BT), rows)
        losses = [self._part(batch, slice(row, row + rows), part, step, backward=backward) for row in starts]
        if backward and self.canonical is not None:
            self.canonical.collect_gradients()
        return Losses(*(torch.stack(each).sum() for each in zip(*losses, strict=True)))

    def _part(self, batch: Batch, rows: slice, part: Part | None, step: int, *, backward: bool) -> Losses:
        """Of some rows of the batch, without a graph."""
        there = {"device": self.mesh.device, "non_blocking": True}
        tokens_BT, targets_BT = (x[rows].to(**there) for x in (batch.tokens_BT, batch.targets_BT))
        context, documents = self.experiment.data.context, batch.document_starts[rows]
        first_row = self.mesh.data_rank * len(batch.tokens_BT) + rows.start
        dropout_key = DropoutKey(self.experiment.seed, step, first_row) if backward else None

        def compute(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, shard: SequenceShard) -> Losses:
            losses = model(tokens_BT, targets_BT, shard, dropout_key, part)
            if backward:
                losses.total.backward()
            return Losses(*(each.detach() for each in losses))

        if self.canonical is not None:
            return self.canonical.run(compute, tokens_BT, targets_BT, context, documents, self.ledger)
        shard = self.mesh.shard(context, documents, self.ledger, checked=not self._compared)
        self._compared = True
        return compute(self.module, tokens_BT, targets_BT, shard)

    def clip(self, most: float) -> float:
        """Scales the gradients down to the norm `most` if that is above 0; the norm they had, over all processes."""
        # canonical gradients are whole on every process
        mesh = None if self.canonical else self.mesh
        return float(clip_gradients(self.module.parameters(), most if most > 0 else None, mesh))

    def end_step(self) -> None:
        """After the optimiser's step: what models adapt by themselves, as their experts' selection bias."""
        with unchanged(self._still):
            (self.canonical or self.module).end_step()
