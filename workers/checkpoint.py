"""Sharded checkpoints: every process writes its own part, a manifest written last makes it a checkpoint.

What is saved: parameters and buffers, both moments of the optimiser, and every process's random state, as tensors in
torch.distributed.checkpoint's (DCP) format; step, tokens and the position in the data's global order in the
manifest. The learning rate follows from the step. DTensor placements let it be loaded onto any other degrees.
A model without an optimiser, as an import saves it, has neither moments nor random state, and its manifest says so.

All traffic between processes runs over a gloo group of its own, so that saving may run beside training in a thread:
on the training's group the two would wait for each other's messages.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from .checkpoint_policy import LATEST, CheckpointConfig, candidates, prune
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

LONG_WAIT = 1.0  # seconds that training may wait for the checkpoint before without a word
MODEL, OPTIMIZER, RANDOM = "model.", "optimizer.", "random.rank-"
ResultT = TypeVar("ResultT")


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
        self.group = gloo_group()
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
        for name in self._from_first(lambda: [found.name for found in candidates(self.run, wanted)]):
            checkpoint = Checkpoint(self.run, name)
            shares = self._from_all(lambda checkpoint=checkpoint: checkpoint.problems(self.rank, self.world_size))
            problems = [problem for share in shares for problem in share]
            if not problems:
                return checkpoint, self._from_first(checkpoint.read_manifest), rejected
            rejected.append(rejection(checkpoint, problems))
        raise NoCheckpoint(self._from_first(lambda: explain_none(self.run, rejected)))

    def load(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        """Overwrites model, optimiser and random state. Call it with what `find` returned.

        Raises ValueError when it holds another model or not all moments, CheckpointError when it cannot be read.
        """
        reader = RestrictedReader(checkpoint.storage)
        # Zeros are right for moments only where no step has been made.
        beginning = manifest.weights_only and manifest.step == 0
        tensors = model_tensors(self.model) if beginning else self._tensors()
        found: list[Mapping[str, Any]] = []
        self._from_all(lambda: found.append(reader.read_metadata().state_dict_metadata))
        (saved,) = found
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
            self.optimizer.steps = manifest.step
            if beginning:
                self.optimizer.forget()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything but random state, as aliases of the live tensors."""
        return model_tensors(self.model) | optimizer_tensors(self.optimizer)

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
        name = self._from_first(lambda: self._begin(progress.step))
        checkpoint = Checkpoint(self.run, name)
        writer = DigestingWriter(checkpoint.storage)
        try:
            save(tensors, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:
            raise CheckpointError(f"checkpoint {name} was not written ({_first_failure(error)})") from error
        files: dict[str, dict[str, Any]] = {}
        for written in self._gather(writer.digests()):
            files |= written
        manifest = replace(progress, files=files, weights_only=self.optimizer is None)
        self._from_first(lambda: self._commit(checkpoint, manifest))

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

    def _from_first(self, work: Callable[[], ResultT]) -> ResultT:
        """What `work` returns on the first process, on all; CheckpointError on all when it fails.

        RunTaken on all when it finds that.
        """
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except RunTaken as error:
                outcome[1] = error
            except Exception as error:
                outcome[1] = f"checkpoints of run {self.run.name}: {error or type(error).__name__}"
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if isinstance(outcome[1], RunTaken):
            raise outcome[1]
        if outcome[1] is not None:
            raise CheckpointError(outcome[1])
        return outcome[0]

    def _from_all(self, work: Callable[[], ResultT]) -> list[ResultT]:
        """What `work` returns on every process, on all; CheckpointError on all when it fails on one."""
        try:
            outcome: tuple[Any, str | None] = (work(), None)
        except Exception as error:
            outcome = (None, f"process {self.rank}: {error or type(error).__name__}")
        outcomes = self._gather(outcome)
        if failures := [failure for _, failure in outcomes if failure]:
            raise CheckpointError(f"checkpoints of run {self.run.name}: {failures[0]}")
        return [value for value, _ in outcomes]

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def gloo_group() -> dist.ProcessGroup:
    """A new group of all processes for traffic of its own, on the CPU. All processes call it, in the same order."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their name in a checkpoint, as aliases."""
    return {f"{MODEL}{name}": tensor for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: ShardedAdamW | None) -> dict[str, Tensor]:
    """The optimiser's moments by their name in a checkpoint, as aliases."""
    return {} if optimizer is None else {f"{OPTIMIZER}{k}": tensor for k, tensor in optimizer.state_dict().items()}


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


def check_fit(tensors: Mapping[str, Tensor], saved: Mapping[str, Any], name: str) -> None:
    """ValueError unless the checkpoint holds every one of `tensors` in its shape, and no other parameter."""
    for key, tensor in tensors.items():
        stored = saved.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            problem = "cannot be trained on" if key.startswith(OPTIMIZER) else "does not fit the model"
            raise ValueError(f"checkpoint {name} {problem}: it has no {key}")
        if stored.size != tensor.shape:
            raise ValueError(
                f"checkpoint {name} does not fit the model: {key} is {tuple(stored.size)} there and "
                f"{tuple(tensor.shape)} here"
            )
    extra = [key for key in saved if key.startswith(MODEL) and key not in tensors]
    if extra:
        raise ValueError(f"checkpoint {name} does not fit the model: the model has no {extra[0]}")


def _first_failure(error: CheckpointException) -> str:
    rank, cause = next(iter(error.failures.items()))
    return f"process {rank}: {cause[0]}"
