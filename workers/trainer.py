"""The training loop of one process.

A step: the loader's slice -> loss -> backward (each process's part of the gradient of the one global loss; FSDP sums)
-> clip by the true global norm -> AdamW -> a record. The loop knows neither model families nor how work is split.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import asdict, replace

import torch

from ..data import Batch, Corpus, Stage
from ..models import Losses
from ..parallel import CommunicationLedger, Mesh
from .checkpoint import Checkpointer
from .communication import write_communication
from .exchange import StepExchange
from .experiment import Experiment
from .liveness import alive
from .manifest import Manifest, NoCheckpoint
from .metrics import PASSES, StepRecord
from .optimization import ShardedAdamW, learning_rate
from .profiling import profile_name, profiled
from .random_state import seed_everything
from .recovery import BadBatches, BadLoss
from .reporting import Reporter, RunStart, Silent
from .run_directory import RunDirectory, code_version, timestamp
from .run_tokenizer import keep_tokenizer
from .saving import Saving
from .shared_outcomes import gloo_group
from .split_model import SplitModel
from .tracking import Tracker


class Trainer:
    """Trains one experiment in one run directory, or one stage of it; every process of the mesh has one.

    Args:
        experiment: with the context of the stage, see `Experiment.at`.
        mesh: of the experiment's degrees.
        run: made before; the first process writes records and run.json there.
        reporter: told what happens, on the first process.
        stage: the steps to make; by default all.
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
        stage: Stage | None = None,
        corpus: Corpus | None = None,
        tracker: Tracker | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.experiment, self.mesh, self.run = experiment, mesh, run
        self.stage = stage or experiment.stages[-1]
        self.reporter: Reporter = reporter or Silent()
        self.corpus = corpus or experiment.open_corpus()
        self._fingerprint, self._corpus_tokens = self.corpus.fingerprint(), self.corpus.num_tokens("train")
        self.tracker = tracker
        self.stop = stop or threading.Event()
        self.first = mesh.rank == 0
        self.step_count, self.tokens, self.position = 0, 0, 0
        self._start_number, self._rewinds = 0, 0  # of this start, on the first process
        self._ended: float | None = None  # the step before, on this process's clock
        self.last_record: StepRecord | None = None
        self.validation_loss: float | None = None
        self.ledger = CommunicationLedger()
        seed_everything(experiment.seed, mesh.rank)
        self._split = SplitModel(experiment, mesh, self.ledger)
        self.model = self._split.module
        self._flops_per_token = PASSES * self.model.flops_per_token(experiment.data.context)
        self.optimizer = ShardedAdamW(self.model, experiment.train)
        self.checkpointer = Checkpointer(run, experiment.checkpoint, self.model, self.optimizer)
        self.saving = Saving(self.checkpointer, experiment.checkpoint, experiment.recovery, self._noted)
        self._control = gloo_group()
        self._exchange = StepExchange(mesh, self.ledger, self._control)
        data = experiment.data
        self.bad_batches = BadBatches(run, experiment.recovery, data.context, data.batch, self._control)
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
        self.position = manifest.resume_position(self.experiment.data.context, self.experiment.data.batch)
        if self.first:
            for line in rejected:
                self._noted(line)
            if manifest.corpus != self._fingerprint:
                self._noted(f"data.corpus={self.corpus.name} is not what the checkpoint was trained on")
            self.run.metrics.rewind(manifest.step)
            self._rewinds += 1
        self._pass_on_notes()

    def train(self) -> bool:
        """Makes the stage's steps that are left, and a checkpoint; False when asked to stop before the run's end.

        It makes none when the run is in an earlier stage, and ends when a rollback takes it there.

        Raises TrainingError when the loss stays bad, or checkpoints in a row, or the last, cannot be written.
        """
        if self.step_count < self.stage.first:
            return True
        self.bad_batches.read(self.step_count)
        self.loader.seek(self.position)
        if self.first:
            self._record_start()
        stopping, counted = False, False
        with_checkpoints = self.experiment.checkpoint.keep_best > 0
        self.saving.begin(self.step_count)
        try:
            while self.stage.first <= self.step_count < self.stage.last and not stopping:
                try:
                    with self._profiled():
                        record, stopping = self.step()
                except BadLoss as bad:
                    self._go_past(bad)
                    continue
                if not counted:
                    write_communication(self.run, self.ledger, self.step_count, self._control)
                    counted = True
                validating = self._due(self.experiment.train.validate_every) or self.step_count == self.stage.last
                if validating or (with_checkpoints and self.saving.due):
                    self.validation_loss = self.validate()
                    record = replace(record, validation_loss=self.validation_loss)
                self._log(record)
                self.saving.after_step(self.step_count, self.save)
            self.saving.finish(self.step_count, self.save)
            self._pass_on_notes()
        except Exception:
            # What is being written beside training is of a step that was good.
            with contextlib.suppress(Exception):
                self.checkpointer.wait()
            raise
        finally:
            self.loader.close()
        return not stopping or self.step_count >= self.experiment.train.steps

    def step(self) -> tuple[StepRecord, bool]:
        """One optimiser step; its record, and whether any process was asked to stop."""
        began = time.perf_counter()
        pause = 0.0 if self._ended is None else began - self._ended
        self.ledger.reset()
        while self.position in self.bad_batches:
            self.position += 1
            self.loader.seek(self.position)
        asked = time.perf_counter()
        batch = next(self.loader)
        reading = time.perf_counter() - asked
        losses = self._losses(batch, backward=True)
        # Here the process waits for its device: a bad loss or norm must be known before the weights see it.
        norm = self._split.clip(self.experiment.train.clip)
        loss = float(losses.cross_entropy.detach())
        if problem := self.bad_batches.guard.problem(loss, norm):
            self.optimizer.zero_grad()
            raise BadLoss(f"{problem} at step {self.step_count + 1}", batch.step)
        rate = learning_rate(self.experiment.train, self.step_count + 1)
        self.optimizer.step(rate)
        self._split.end_step()
        self.optimizer.zero_grad()
        self.bad_batches.guard.add(loss)
        self.step_count += 1
        self.position = batch.step + 1
        step_tokens = self.experiment.data.context * self.experiment.data.batch
        self.tokens += step_tokens
        self._ended = time.perf_counter()
        seconds = self._ended - began
        shared = self._exchange(seconds, reading, stop=self.stop.is_set(), **self.saving.own())
        self.saving.learn(self.step_count, shared)
        record = StepRecord(
            step=self.step_count,
            loss=loss,
            validation_loss=None,
            tokens=self.tokens,
            tokens_per_second=step_tokens / seconds,
            flops_per_second=self._flops_per_token * step_tokens / seconds,
            learning_rate=rate,
            grad_norm=norm,
            seconds=seconds,
            auxiliary_loss=float(losses.routers.detach()),
            time=self.run.metrics.now(),
            start=self._start_number,
            rewinds=self._rewinds,
            pause=pause,
            context=self.experiment.data.context,
            epochs=self.tokens / self._corpus_tokens,
            **shared.measures._asdict(),
        )
        return record, shared.stop

    @torch.no_grad()
    def validate(self) -> float:
        """Cross-entropy of the held-out sequences, nats per token; the same on every process."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.validation:
            total += float(self._losses(batch).cross_entropy) * batch.num_targets
            count += batch.num_targets
            alive()
        self.model.train()
        return total / max(1, count)

    def save(self, *, wait: bool = True) -> None:
        """Writes a checkpoint of this moment; see `Checkpointer.save`."""
        data, record = self.experiment.data, self.last_record
        measured = record.validation_loss if record is not None and record.step == self.step_count else None
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
            validation_loss=measured,
        )
        self.checkpointer.save(progress, wait=wait)
        self._pass_on_notes()
        self.saving.timer.restart()
        self.bad_batches.progressed()

    def _noted(self, line: str) -> None:
        if self.first:
            self.reporter.noted(line)

    def _pass_on_notes(self) -> None:
        for line in self.checkpointer.take_notes():
            self._noted(line)

    def _go_past(self, bad: BadLoss) -> None:
        """Leaves a bad batch out for good, and rolls back first if that is asked for. TrainingError: too often."""
        self.saving.settle()
        self.bad_batches.leave_out(bad, self.step_count + 1)
        back = ""
        if self.experiment.recovery.bad_loss == "rollback":
            with contextlib.suppress(NoCheckpoint):
                self.restore()
                self.saving.begin(self.step_count)
                back = f" and the run is back at step {self.step_count}"
        self.bad_batches.read(self.step_count)
        self.loader.seek(self.position)
        self._noted(f"{bad}: batch {bad.position} is left out{back}")

    def _profiled(self) -> contextlib.AbstractContextManager[None]:
        step = self.step_count + 1
        if step != self.experiment.train.profile:
            return contextlib.nullcontext()
        self._noted(f"step {step} is profiled: {self.run.url}/{profile_name(step, self.mesh.rank)}")
        return profiled(self.run, step, self._control, self._noted)

    def _losses(self, batch: Batch, *, backward: bool = False) -> Losses:
        return self._split.losses(batch, self.step_count, backward=backward)

    def _log(self, record: StepRecord) -> None:
        self.last_record = record
        if self.first and self.run.lost():
            self.stop.set()  # all leave after the next step, and learn why where they would save
        elif self.first:
            if line := self.run.metrics.append(record):
                self._noted(line)
            self.reporter.stepped(record)
            if self.tracker is not None:
                self.tracker.record(record)
                if line := self.tracker.take_note():
                    self._noted(line)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step_count % every == 0

    def _record_start(self) -> None:
        """In the run's directory and to who watches, by the first process."""
        if self.step_count == 0:
            self.run.metrics.rewind(0)  # of an earlier start that left no checkpoint
        data = self.experiment.data
        place = {"step": self.step_count, "context": data.context, "batch": data.batch}
        mesh = {"workers": self.mesh.world_size, "parallel": asdict(self.mesh.degrees)}
        left_out = {"skipped_shards": list(self.corpus.skipped)} if self.corpus.skipped else {}
        keep_tokenizer(self.run, self.corpus.tokenizer)
        self._start_number, self._rewinds = self.run.record_start(**place, **mesh, **left_out), 0
        self.reporter.started(self._start())

    def _start(self) -> RunStart:
        experiment = self.experiment
        return RunStart(
            name=self.run.name,
            url=self.run.url,
            step=self.step_count,
            steps=experiment.train.steps,
            until=self.stage.last,
            parameters=self.model.num_parameters(),
            trained=self.optimizer.num_parameters,
            corpus=self.corpus.name,
            context=experiment.data.context,
            batch=experiment.data.batch,
            workers=self.mesh.world_size,
            parallel=asdict(self.mesh.degrees),
            dtype=experiment.train.dtype,
            device=self.mesh.device,
        )
