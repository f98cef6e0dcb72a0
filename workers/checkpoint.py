"""Sharded checkpoints: every process writes its own part, a manifest written last makes it a checkpoint.

What is saved: parameters and buffers, both moments of the optimiser of every parameter that is trained, and every
process's random state, as tensors in torch.distributed.checkpoint's (DCP) format; step, tokens and the position in the
data's global order in the manifest. The learning rate follows from the step. DTensor placements let it be loaded onto
any other degrees.
A model without an optimiser, as an import saves it, has neither moments nor random state, and its manifest says so.

All traffic between processes runs over a gloo group of its own, so that saving may run beside training in a thread:
on the training's group the two would wait for each other's messages.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from .checkpoint_policy import LATEST, CheckpointConfig, candidates, prune
from .checkpoint_tensors import RANDOM, check_fit, model_tensors, optimizer_tensors, trained_in
from .configuration import ConfigError
from .dcp_storage import DigestingWriter, RestrictedReader
from .manifest import (
    MANIFEST_FILE,
    Checkpoint,
    Manifest,
    NoCheckpoint,
    explain_none,
    new_checkpoint,
    rejection,
)
from .optimization import ShardedAdamW, local
from .random_state import random_state, set_random_state
from .run_directory import RunDirectory, RunTaken
from .shared_outcomes import SharedOutcomes, gloo_group
from .trained_parameters import changed_set

# How long a process may read or write its part while the others wait for it. Torch's own half hour is not enough for
# 100 GB over 50 MB/s; who is lost closes its connections and is noticed at once.
TIMEOUT = timedelta(hours=3)
LONG_WAIT = 1.0  # seconds that training may wait for the checkpoint before without a word


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message is one line."""


class Checkpointer:
    """Writes and reads the checkpoints of one run; every process of the run has one and calls it alike.

    Args:
        model, optimizer: whose tensors are saved and, at a load, overwritten in place.
    """

    def __init__(
        self, run: RunDirectory, config: CheckpointConfig, model: nn.Module, optimizer: ShardedAdamW | None = None
    ) -> None:
        self.run, self.config = run, config
        self.model, self.optimizer = model, optimizer
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.group = gloo_group(TIMEOUT)
        as_is = (RunTaken, ConfigError, NoCheckpoint)
        self._shared = SharedOutcomes(self.group, f"checkpoints of run {run.name}", CheckpointError, as_is)
        self.written = 0  # how many were
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._staged: dict[str, Tensor] = {}  # kept from save to save: fresh memory costs more than the copy
        self._notes: list[str] = []

    def save(self, progress: Manifest, *, wait: bool = True) -> None:
        """Saves a checkpoint; `progress` is its manifest without the files.

        With `wait` it is committed when this returns. Without, it is written by a thread after a copy was made; the
        next save, or `wait`, ends after it. Raises CheckpointError on every process when it cannot be written, also
        for the one before that was written beside training.
        """
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > LONG_WAIT and not wait:
            raised = "checkpoint.every" if self.config.every else "checkpoint.minutes"
            self._notes.append(f"waited {waited:.1f} s for the checkpoint before; raise {raised}")
        tensors = self._tensors()
        if self.optimizer is not None:
            tensors[f"{RANDOM}{self.rank}"] = random_state()
        if wait:
            self._write(tensors, progress)
            return
        self._stage(tensors)
        work = (self._staged, progress)
        self._thread = threading.Thread(target=self._write_aside, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError if that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def failed(self) -> bool:
        """Whether the one beside training cannot be written, as far as this process knows; `wait` says why."""
        return self._error is not None

    def take_notes(self) -> list[str]:
        """What a person should know of the checkpoints written so far, a line each, once. The first process has all."""
        taken, self._notes = self._notes, []
        return taken

    def latest(self) -> tuple[Checkpoint, Manifest, list[str]]:
        """`find` of the newest checkpoint."""
        return self.find(LATEST)

    def find(self, wanted: str) -> tuple[Checkpoint, Manifest, list[str]]:
        """The first whole one of the checkpoints that `wanted` means (see `candidates`), and one line for every one
        before it that is not whole.

        All processes share the reading and come to the same answer. Raises NoCheckpoint when there is none, and
        CheckpointError when the store cannot be reached: that says nothing about a checkpoint.
        """
        rejected: list[str] = []
        for name in self._shared.from_first(lambda: [found.name for found in candidates(self.run, wanted)]):
            checkpoint = Checkpoint(self.run, name)
            look = partial(checkpoint.problems, self.rank, self.world_size)
            problems = [problem for share in self._shared.from_all(look) for problem in share]
            if not problems:
                return checkpoint, self._shared.from_first(checkpoint.read_manifest), rejected
            rejected.append(rejection(checkpoint, problems))
        raise NoCheckpoint(self._shared.from_first(lambda: explain_none(self.run, rejected)))

    def load(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        """Overwrites model, optimiser and random state. Call it with what `find` returned.

        Parameters that were not trained have no moments in it: theirs begin at zero.

        Raises ValueError when it holds another model or no moments, CheckpointError when it cannot be read.
        """
        reader = RestrictedReader(checkpoint.storage)
        found: list[Mapping[str, Any]] = []
        self._shared.from_all(lambda: found.append(reader.read_metadata().state_dict_metadata))
        (saved,) = found
        anew = self._without_moments(manifest, saved)
        tensors = self._tensors(anew)
        check_fit(tensors, saved, checkpoint.name)
        own = f"{RANDOM}{self.rank}"
        stored = saved.get(own)
        # Another number of processes has no random state of its own in the checkpoint: it keeps its own.
        if manifest.world_size == self.world_size and isinstance(stored, TensorStorageMetadata):
            tensors[own] = torch.empty(stored.size, dtype=torch.uint8)
        try:
            load(tensors, storage_reader=reader, process_group=self.group)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {checkpoint.name} was not read ({_first_failure(error)})") from error
        if own in tensors:
            set_random_state(tensors[own])
        if self.optimizer is not None:
            self.optimizer.resume(manifest.step, manifest.begun, anew)

    def _without_moments(self, manifest: Manifest, saved: Mapping[str, Any]) -> list[str]:
        """The trained parameters of which no moments were saved; notes what that means for a run that has begun."""
        if self.optimizer is None:
            return []
        trained = self.optimizer.parameters
        if manifest.weights_only:
            # Zeros are right for moments only where no step has been made.
            return [*trained] if manifest.step == 0 else []
        before = trained_in(saved)
        self._notes += changed_set(before, trained, manifest.step)
        return [name for name in trained if name not in before]

    def _tensors(self, without: Sequence[str] = ()) -> dict[str, Tensor]:
        """Everything but random state, as aliases of the live tensors; no moments of the parameters `without`."""
        return model_tensors(self.model) | optimizer_tensors(self.optimizer, without)

    def _stage(self, tensors: dict[str, Tensor]) -> None:
        """Copies to host memory, placed like the originals; pinned where they come from a GPU."""
        for name, tensor in tensors.items():
            part, staged = local(tensor), self._staged.get(name)
            if staged is None or local(staged).shape != part.shape or local(staged).dtype != part.dtype:
                empty = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                # from_local would move the copy back to the mesh's device
                placed = isinstance(tensor, DTensor)
                self._staged[name] = DTensor(empty, tensor._spec, requires_grad=False) if placed else empty
            local(self._staged[name]).copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _write_aside(self, tensors: dict[str, Tensor], progress: Manifest) -> None:
        try:
            self._write(tensors, progress)
        except BaseException as error:
            self._error = error

    def _write(self, tensors: dict[str, Tensor], progress: Manifest) -> None:
        name = self._shared.from_first(lambda: self._begin(progress.step))
        checkpoint = Checkpoint(self.run, name)
        try:
            self._write_to(checkpoint, tensors, progress)
        except CheckpointError:
            if self.rank == 0 and checkpoint.storage.local:
                with contextlib.suppress(OSError):
                    checkpoint.remove()  # what does not fit on a full disk should not fill it
            raise
        self.written += 1

    def _write_to(self, checkpoint: Checkpoint, tensors: dict[str, Tensor], progress: Manifest) -> None:
        writer = DigestingWriter(checkpoint.storage)
        try:
            save(tensors, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {checkpoint.name} was not written ({_first_failure(error)})") from error
        files: dict[str, dict[str, Any]] = {}
        for written in self._shared.gather(writer.digests()):
            files |= written
        begun = {} if self.optimizer is None else self.optimizer.begun
        manifest = replace(progress, files=files, weights_only=self.optimizer is None, begun=begun)
        self._shared.from_first(lambda: self._commit(checkpoint, manifest))

    def _begin(self, step: int) -> str:
        self.run.check_owner()
        # What a resume will not compute again must be in the log before the checkpoint says so.
        self.run.metrics.flush()
        return new_checkpoint(self.run, step).name

    def _commit(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.run.check_owner()
        for name, file in manifest.files.items():
            length = checkpoint.storage.size(name)
            if length != file["bytes"]:
                raise OSError(f"{name} has {length} bytes after {file['bytes']} were written")
        checkpoint.storage.write_text(MANIFEST_FILE, manifest.to_json())
        try:
            prune(self.run, self.config.keep, self.config.keep_best)
        except OSError as error:  # this checkpoint is committed all the same
            self._notes.append(f"older checkpoints were not removed ({error}); the next checkpoint tries again")


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """The weights alone, whole, into a model on this one process; no process group takes part.

    Raises ValueError when the checkpoint holds another model. It reads what is there: verify it first.
    """
    reader = RestrictedReader(checkpoint.storage)
    tensors = model_tensors(model)
    check_fit(tensors, reader.read_metadata().state_dict_metadata, checkpoint.name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)


def _first_failure(error: CheckpointException) -> str:
    rank, cause = next(iter(error.failures.items()))
    return f"process {rank}: {cause[0]}"
