"""Which checkpoints a run has, and which of them can be trusted.

    checkpoints/step-00000200/            the first attempt at step 200
    checkpoints/step-00000200.1/          another, after a resume from before it
        __0_0.distcp ... .metadata        DCP's files
        manifest.json                     length and SHA-256 of every file, written last

A directory is never written twice. Without a manifest it is no checkpoint, whatever else lies in it; with one, it is
trusted once every file has the length and digest that the manifest says.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .dcp_storage import digest_file
from .run_directory import RunDirectory
from .storage import Storage, StorageError

CHECKPOINTS = "checkpoints"
MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


class NoCheckpoint(ValueError):
    """A run has no checkpoint that is whole."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step, tokens: steps finished and tokens trained on.
        position: the step that the loader hands out next.
        context, batch: of the data that `position` counts.
        corpus: the corpus's fingerprint.
        world_size: processes that wrote it; `parallel`: their degrees.
        files: by name, {"bytes", "sha256"}.
        validation_loss: of the model in it, nats per token; None where it was not measured after this step.
        weights_only: parameters and buffers are all that it holds, as after an import.
        begun: of the trained parameters that were frozen at first, by name, the step after which their moments began.
    """

    step: int
    tokens: int
    position: int
    context: int
    batch: int
    corpus: str
    world_size: int
    parallel: dict[str, int]
    created: str
    code_version: str
    files: dict[str, dict[str, Any]]
    validation_loss: float | None = None
    weights_only: bool = False
    begun: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        values = asdict(self)
        if self.validation_loss is not None and not math.isfinite(self.validation_loss):
            values["validation_loss"] = None  # NaN and infinity are no JSON
        return json.dumps({"format": _FORMAT} | values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """ValueError: not a manifest, or one of a newer format. Fields of newer versions are ignored."""
        try:
            values = json.loads(text)
            if values.pop("format") != _FORMAT:
                raise ValueError("manifest.json has an unknown format; it was written by a newer version")
            manifest = cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})
            if outside := [name for name in manifest.files if name != os.path.basename(name)]:  # noqa: PTH119
                raise ValueError(f"manifest.json names a file outside of the checkpoint, {outside[0]}")
            return manifest
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError):
            raise ValueError("manifest.json is damaged") from None

    def resume_position(self, context: int, batch: int) -> int:
        """The step of the data's global order to go on with, in sequences of `context` tokens, `batch` a step.

        With the same context the order is the same: the next sequence that was not seen, rounded up to a whole batch.
        Another context has another order: as many tokens into it as were trained on.
        """
        if context == self.context:
            return -(-self.position * self.batch // batch)
        return -(-self.tokens // (context * batch))


class Checkpoint:
    """One directory below a run's checkpoints, whole or not."""

    def __init__(self, run: RunDirectory, name: str) -> None:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a checkpoint's name, such as step-00000200")
        self.name = name
        self.step = int(match[1])
        self.attempt = int(match[2] or 0)
        self.storage: Storage = run.storage / f"{CHECKPOINTS}/{name}"

    @property
    def committed(self) -> bool:
        """Whether a manifest is there. It says that writing ended well, not that the files are still as written."""
        return self.storage.exists(MANIFEST_FILE)

    def read_manifest(self) -> Manifest:
        """ValueError: there is none, or it is damaged."""
        if not self.committed:
            raise ValueError("no manifest.json: writing it did not end")
        return Manifest.from_json(self.storage.read_text(MANIFEST_FILE))

    def problems(self, part: int = 0, parts: int = 1) -> list[str]:
        """What keeps this checkpoint from being trusted; empty when it is whole. Reads every byte.

        Several processes can share the reading: number `part` of `parts` looks at every `parts`-th file.
        """
        try:
            manifest = self.read_manifest()
        except ValueError as error:
            return [str(error)]
        if ".metadata" not in manifest.files:
            return ["manifest.json does not list .metadata"]
        found = (_compare(self.storage, name, manifest.files[name]) for name in sorted(manifest.files)[part::parts])
        return [problem for problem in found if problem]

    def remove(self) -> None:
        """Manifest first: what is left of an interrupted removal is no checkpoint."""
        self.storage.remove(MANIFEST_FILE)
        self.storage.remove("")


def list_checkpoints(run: RunDirectory) -> list[Checkpoint]:
    """All checkpoint directories of a run, oldest step first, whole or not."""
    names = [name for name in run.storage.directories(CHECKPOINTS, links=False) if _NAME.fullmatch(name)]
    return sorted((Checkpoint(run, name) for name in names), key=lambda found: (found.step, found.attempt))


def newest_whole(run: RunDirectory) -> tuple[Checkpoint, Manifest, list[str]]:
    """The newest checkpoint that is whole, and one line for every newer one that is not; reads every byte of them.

    NoCheckpoint (a ValueError) when there is none. For one process alone; `Checkpointer.find` shares the reading.
    """
    return first_whole(run, list_checkpoints(run)[::-1])


def first_whole(run: RunDirectory, candidates: Sequence[Checkpoint]) -> tuple[Checkpoint, Manifest, list[str]]:
    """As `newest_whole`, of these checkpoints of the run in this order."""
    rejected: list[str] = []
    for checkpoint in candidates:
        problems = checkpoint.problems()
        if not problems:
            return checkpoint, checkpoint.read_manifest(), rejected
        rejected.append(rejection(checkpoint, problems))
    raise NoCheckpoint(explain_none(run, rejected))


def rejection(checkpoint: Checkpoint, problems: Sequence[str]) -> str:
    """The line that says why a checkpoint is not used."""
    return f"checkpoint {checkpoint.name} is skipped: {problems[0]}"


def new_checkpoint(run: RunDirectory, step: int) -> Checkpoint:
    """A checkpoint directory for `step` that has never been used."""
    taken = [found.attempt for found in list_checkpoints(run) if found.step == step]
    attempt = max(taken) + 1 if taken else 0
    return Checkpoint(run, f"step-{step:08d}" + (f".{attempt}" if attempt else ""))


def explain_none(run: RunDirectory, rejected: Sequence[str]) -> str:
    """The line for a run that cannot be resumed: what was found and what to do."""
    found = f": {'; '.join(rejected)}" if rejected else ""
    if len(rejected) < len(list_checkpoints(run)):  # others were not asked for
        return f"run {run.name} has no such whole checkpoint{found}. `longstride checkpoints {run.url}` lists all"
    return (
        f"run {run.name} has no complete checkpoint{found}. Train it anew with "
        f"`longstride train {run.url}/experiment.yaml run.name={run.name}-again`"
    )


def _compare(storage: Storage, name: str, expected: dict[str, Any]) -> str | None:
    try:
        found = digest_file(storage, name)
    except FileNotFoundError:
        return f"{name} is missing"
    except StorageError:  # of the store, and says nothing about the file
        raise
    except Exception as error:  # every file system has its own family of errors
        return f"{name} cannot be read ({getattr(error, 'strerror', None) or error})"
    if found["bytes"] != expected["bytes"]:
        return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
    return f"{name} is damaged (its SHA-256 differs)" if found["sha256"] != expected["sha256"] else None
