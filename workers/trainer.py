"""The training loop of one process.

A step: the loader's slice -> loss -> backward (each process's part of the gradient of the one global loss; FSDP sums)
-> clip by the true global norm -> AdamW -> a record. The loop knows neither model families nor how work is split.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import asdict, replace

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import Batch, Corpus
from ..models import LanguageModel, Losses, build_model, initialise
from ..parallel import CanonicalModel, CommunicationLedger, Mesh, SequenceShard, clip_gradients, shard_model
from .checkpoint import Checkpointer, gloo_group
from .communication import write_communication
from .experiment import Experiment
from .manifest import Manifest, NoCheckpoint
from .metrics import StepRecord, read_records
from .optimization import ShardedAdamW, learning_rate
from .random_state import seed_everything
from .recovery import LossGuard, record_skipped, skipped_positions
from .reporting import Reporter, RunStart, Silent
from .run_directory import RunDirectory, code_version, timestamp
from .tracking import Tracker


class TrainingError(Exception):
    """Training cannot go on; the message is one line with the cause and what to do."""


class BadLoss(TrainingError):
    """A step whose loss or gradient cannot be trained on; the weights have not seen it. `position`: of its batch."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class Trainer:
    """Trains one experiment in one run directory; every process of the mesh has one.

    Args:
        mesh: of the experiment's degrees.
        run: made before; the first process writes records and run.json there.
        reporter: told what happens, on the first process.
        corpus: the experiment's, when it is open already.
        tracker: mirrors records to MLflow, on the first process.
        stop: once set on any process, training ends after the step at hand with a checkpoint.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        run: RunDirectory,
        reporter: Reporter | None = None,
        *,
        corpus: Corpus | None = None,
        tracker: Tracker | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.experiment, self.mesh, self.run = experiment, mesh, run
        self.reporter: Reporter = reporter or Silent()
        self.corpus = corpus or experiment.open_corpus()
        self._fingerprint = self.corpus.fingerprint()
        self.tracker = tracker
        self.stop = stop or threading.Event()
        self.first = mesh.rank == 0
        self.step_count, self.tokens, self.position = 0, 0, 0
        self.last_record: StepRecord | None = None
        self.validation_loss: float | None = None
        self.ledger = CommunicationLedger()
        seed_everything(experiment.seed, mesh.rank)
        tiles = experiment.train.canonical
        if tiles:
            model = build_model(experiment.model, seed=experiment.seed, dtype=experiment.train.parameter_dtype)
            self.model = model.to(mesh.device)
        else:
            self.model = make_sharded_model(experiment, mesh)
        self.canonical = CanonicalModel(self.model, tiles, mesh.sequence_group) if tiles else None
        self.optimizer = ShardedAdamW(self.model, experiment.train)
        self.checkpointer = Checkpointer(run, experiment.checkpoint, self.model, self.optimizer)
        self._control = gloo_group()
        self._guard, self._skipped, self._setbacks = LossGuard(experiment.recovery), set[int](), 0
        self._process = psutil.Process()
        self._bounds = mesh.shard(experiment.data.context)
        share = {"data_rank": mesh.data_rank, "data_size": mesh.data_size}
        slice_ = (self._bounds.start, self._bounds.stop)
        self.loader = experiment.data.training(self.corpus, seed=experiment.seed, bounds=slice_, **share)
        self.validation = experiment.data.validation(self.corpus, bounds=slice_, **share)

    def restore(self) -> None:
        """Continues from the newest whole checkpoint. ValueError when the run has none."""
        checkpoint, manifest, rejected = self.checkpointer.latest()
        seed_everything(self.experiment.seed, self.mesh.rank, manifest.step)
        self.checkpointer.load(checkpoint, manifest)
        self.step_count, self.tokens = manifest.step, manifest.tokens
        self.position = resume_position(manifest, self.experiment.data.context, self.experiment.data.batch)
        if self.first:
            for line in rejected:
                self.reporter.noted(line)
            if manifest.corpus != self._fingerprint:
                self.reporter.noted(f"data.corpus={self.corpus.name} is not what the checkpoint was trained on")
            self.run.metrics.rewind(manifest.step)

    def train(self) -> bool:
        """Makes the steps that are left; True when none is left, False when asked to stop before.

        Raises TrainingError when the loss stays bad, CheckpointError when a checkpoint cannot be written.
        """
        self._prepare_guard()
        self.loader.seek(self.position)
        if self.first:
            if self.step_count == 0:
                self.run.metrics.rewind(0)  # of an earlier start that left no checkpoint
            self.run.record_start(self.step_count, self.mesh.world_size, asdict(self.mesh.degrees))
            self.reporter.started(self._start())
        saved, stopping, counted = self.step_count, False, False
        try:
            while self.step_count < self.experiment.train.steps and not stopping:
                try:
                    record, stopping = self.step()
                except BadLoss as bad:
                    self._go_past(bad)
                    saved = min(saved, self.step_count)
                    continue
                if not counted:
                    write_communication(self.run, self.ledger, self.step_count, self._control)
                    counted = True
                if self._due(self.experiment.train.validate_every) or self.step_count == self.experiment.train.steps:
                    self.validation_loss = self.validate()
                    record = replace(record, validation_loss=self.validation_loss)
                self._log(record)
                if self._due(self.experiment.checkpoint.every):
                    self.save(wait=not self.experiment.checkpoint.asynchronous)
                    saved = self.step_count
            if saved != self.step_count:
                self.save(wait=True)
            self.checkpointer.wait()
        except Exception:
            # What is being written beside training is of a step that was good.
            with contextlib.suppress(Exception):
                self.checkpointer.wait()
            raise
        finally:
            self.loader.close()
        return self.step_count >= self.experiment.train.steps

    def step(self) -> tuple[StepRecord, bool]:
        """One optimiser step; its record, and whether any process was asked to stop."""
        began = time.perf_counter()
        self.ledger.reset()
        while self.position in self._skipped:
            self.position += 1
            self.loader.seek(self.position)
        batch = next(self.loader)
        losses = self._losses(batch, backward=True)
        clip = self.experiment.train.clip
        # canonical gradients are whole on every process
        mesh = None if self.canonical else self.mesh
        norm = float(clip_gradients(self.model.parameters(), clip if clip > 0 else None, mesh))
        loss = float(losses.cross_entropy.detach())
        if problem := self._guard.problem(loss, norm):
            self.optimizer.zero_grad()
            raise BadLoss(f"{problem} at step {self.step_count + 1}", batch.step)
        rate = learning_rate(self.experiment.train, self.step_count + 1)
        self.optimizer.step(rate)
        self.model.end_step()
        self.optimizer.zero_grad()
        self._guard.add(loss)
        self.step_count += 1
        self.position = batch.step + 1
        step_tokens = self.experiment.data.context * self.experiment.data.batch
        self.tokens += step_tokens
        seconds = time.perf_counter() - began
        wait_share, memory, sent, stopping = self._exchange(self.ledger.seconds_waited / seconds)
        record = StepRecord(
            step=self.step_count,
            loss=loss,
            validation_loss=None,
            tokens=self.tokens,
            tokens_per_second=step_tokens / seconds,
            wait_share=wait_share,
            memory=memory,
            learning_rate=rate,
            grad_norm=norm,
            seconds=seconds,
            bytes_sent=sent,
            auxiliary_loss=float(losses.routers.detach()),
            time=time.time(),
        )
        return record, stopping

    @torch.no_grad()
    def validate(self) -> float:
        """Cross-entropy of the held-out sequences, nats per token; the same on every process."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.validation:
            total += float(self._losses(batch).cross_entropy) * batch.num_targets
            count += batch.num_targets
        self.model.train()
        return total / max(1, count)

    def save(self, *, wait: bool = True) -> None:
        """Writes a checkpoint of this moment; see `Checkpointer.save`."""
        if self.first:
            # What a resume will not compute again must be in the log before the checkpoint says so.
            self.run.metrics.flush()
        data = self.experiment.data
        progress = Manifest(
            step=self.step_count,
            tokens=self.tokens,
            position=self.position,
            context=data.context,
            batch=data.batch,
            corpus=self._fingerprint,
            world_size=self.mesh.world_size,
            parallel=asdict(self.mesh.degrees),
            created=timestamp(),
            code_version=code_version(),
            files={},
        )
        self.checkpointer.save(progress, wait=wait)
        self._setbacks = 0

    def _prepare_guard(self) -> None:
        """Batches found bad before, and the losses that a spike is measured against; known to all processes."""
        known: list[object] = [None, None]
        if self.first:
            data = self.experiment.data
            known[0] = skipped_positions(self.run, data.context, data.batch)
            known[1] = [record.loss for record in read_records(self.run.storage) if record.step <= self.step_count]
        dist.broadcast_object_list(known, src=0, group=self._control)
        skipped, losses = known
        assert isinstance(skipped, set) and isinstance(losses, list)
        self._skipped, self._guard = skipped, LossGuard(self.experiment.recovery, losses)

    def _go_past(self, bad: BadLoss) -> None:
        """Leaves a bad batch out for good, and rolls back first if that is asked for. TrainingError: too often."""
        recovery, data = self.experiment.recovery, self.experiment.data
        self._setbacks += 1
        if recovery.bad_loss == "stop" or self._setbacks > recovery.max_failures:
            raise TrainingError(
                f"{bad}; resume from the last checkpoint with a lower train.learning_rate or train.clip"
            ) from bad
        self.checkpointer.wait()
        if self.first:
            entry = {"step": self.step_count + 1, "position": bad.position, "context": data.context}
            record_skipped(self.run, **entry, batch=data.batch, cause=str(bad))
        back = ""
        if recovery.bad_loss == "rollback":
            with contextlib.suppress(NoCheckpoint):
                self.restore()
                back = f" and the run is back at step {self.step_count}"
        self._prepare_guard()
        self.loader.seek(self.position)
        if self.first:
            self.reporter.noted(f"{bad}: batch {bad.position} is left out{back}")

    def _losses(self, batch: Batch, *, backward: bool = False) -> Losses:
        """The losses of a batch; with `backward` the parameters' gradients too."""
        tokens_BT, targets_BT = (tensor.to(self.mesh.device) for tensor in (batch.tokens_BT, batch.targets_BT))
        context = self.experiment.data.context

        def compute(model: nn.Module, tokens_BT: Tensor, targets_BT: Tensor, shard: SequenceShard) -> Losses:
            losses = model(tokens_BT, targets_BT, shard)
            if backward:
                losses.total.backward()
            return losses

        if self.canonical is None:
            return compute(
                self.model, tokens_BT, targets_BT, self.mesh.shard(context, batch.document_starts, self.ledger)
            )
        losses = self.canonical.run(compute, tokens_BT, targets_BT, context, batch.document_starts, self.ledger)
        if backward:
            self.canonical.collect_gradients()
        return losses

    def _exchange(self, wait_share: float) -> tuple[float, int, int, bool]:
        """Over all processes: mean share of waiting, largest memory, bytes sent, whether anyone wants to stop."""
        on_gpu = self.mesh.device == "cuda"
        memory = torch.cuda.max_memory_allocated() if on_gpu else self._process.memory_info().rss
        sent = self.ledger.totals().bytes_sent
        own = torch.tensor([wait_share, float(memory), float(sent), float(self.stop.is_set())], dtype=torch.float64)
        everyone: list[Tensor] = [torch.empty_like(own) for _ in range(self.mesh.world_size)]
        dist.all_gather(everyone, own, group=self._control)
        values = torch.stack(everyone)
        return float(values[:, 0].mean()), int(values[:, 1].max()), int(values[:, 2].sum()), bool(values[:, 3].any())

    def _log(self, record: StepRecord) -> None:
        self.last_record = record
        if self.first:
            self.run.metrics.append(record)
            self.reporter.stepped(record)
            if self.tracker is not None:
                self.tracker.record(record)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step_count % every == 0

    def _start(self) -> RunStart:
        experiment = self.experiment
        return RunStart(
            name=self.run.name,
            url=self.run.url,
            step=self.step_count,
            steps=experiment.train.steps,
            parameters=self.model.num_parameters(),
            corpus=self.corpus.name,
            context=experiment.data.context,
            batch=experiment.data.batch,
            workers=self.mesh.world_size,
            parallel=asdict(self.mesh.degrees),
            dtype=experiment.train.dtype,
            device=self.mesh.device,
        )


def make_sharded_model(experiment: Experiment, mesh: Mesh, *, filled: bool = True) -> LanguageModel:
    """The experiment's model, sharded, with its initial values or not `filled`. No process ever holds all of it."""
    train = experiment.train
    model = build_model(experiment.model, dtype=train.parameter_dtype, device="meta")
    shard_model(
        model,
        mesh,
        blocks=list(model.blocks),
        experts=model.expert_modules(),
        param_dtype=train.compute_dtype,
        forward_methods=("loss", "logits", "scores"),
    )
    model.to_empty(device=mesh.device)
    if filled:
        initialise(model, experiment.seed)
    return model


def resume_position(manifest: Manifest, context: int, batch: int) -> int:
    """The step of the data's global order to go on with.

    With the same context the order is the same: the next sequence that was not seen, rounded up to a whole batch.
    Another context has another order: as many tokens into it as were trained on.
    """
    if context == manifest.context:
        return -(-manifest.position * manifest.batch // batch)
    return -(-manifest.tokens // (context * batch))
