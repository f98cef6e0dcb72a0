"""What each command does. Every function takes the parsed arguments and returns the exit code."""

from __future__ import annotations

import sys
import time
from argparse import Namespace

from ..parallel import LedgerRow
from ..workers import Experiment, RunDirectory, find_run, list_runs
from ..workers.communication import read_communication
from ..workers.manifest import list_checkpoints
from ..workers.metrics import StepRecord, newest_records
from .evaluation import evaluate
from .failures import one_line
from .generation import generate
from .interchange import export, import_
from .job_commands import logs, prepare, status, stop, submit
from .launch import go_on, start
from .listings import presets, settings
from .plan import plan
from .preparation import is_recent
from .tables import amount_of_bytes, columns
from .track import track

__all__ = [
    "checkpoints",
    "communication",
    "evaluate",
    "export",
    "generate",
    "import_",
    "logs",
    "plan",
    "prepare",
    "presets",
    "resume",
    "runs",
    "settings",
    "status",
    "stop",
    "submit",
    "track",
    "train",
]


def train(arguments: Namespace) -> int:
    return start(arguments.config, _checked(arguments.overrides), arguments.address, same=arguments.same)


def resume(arguments: Namespace) -> int:
    return go_on(arguments.run, _checked(arguments.overrides), arguments.address)


def runs(arguments: Namespace) -> int:
    found = list_runs(arguments.directory)
    if not found:
        print(f"no runs in {arguments.directory}")
        return 0
    notes: list[str] = []
    rows = [_row(run, notes) for run in found]
    print(columns(("RUN", "STATE", "STEP", "LOSS", "VALIDATION", "CONTEXT", "CREATED"), rows))
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    return 0


def checkpoints(arguments: Namespace) -> int:
    """Exit code 1 when one of them is broken: scripts can ask."""
    run = find_run(arguments.run)
    rows: list[tuple[str, ...]] = []
    broken = False
    for checkpoint in list_checkpoints(run):
        try:
            manifest = checkpoint.read_manifest()
        except ValueError as error:
            rows.append((checkpoint.name, "-", "-", "-", "-", f"broken: {error}"))
            broken = True
            continue
        problems = checkpoint.problems() if arguments.verify else []
        broken |= bool(problems)
        state = f"broken: {problems[0]}" if problems else ("whole, verified" if arguments.verify else "whole")
        size = amount_of_bytes(sum(int(file["bytes"]) for file in manifest.files.values()))
        loss = "-" if manifest.validation_loss is None else f"{manifest.validation_loss:.4f}"
        rows.append((checkpoint.name, manifest.created, str(manifest.world_size), size, loss, state))
    if not rows:
        print(f"{run.name} has no checkpoints")
        return 0
    print(columns(("CHECKPOINT", "WRITTEN", "WORKERS", "SIZE", "VALIDATION", "STATE"), rows))
    return 1 if broken else 0


def communication(arguments: Namespace) -> int:
    """The ledgers of a run's first step, summed over whatever a line does not stand for."""
    step, processes = read_communication(find_run(arguments.run))
    sums: dict[str, LedgerRow] = {}
    for rank, rows in enumerate(processes):
        for row in rows:
            layer = row.layer or "whole model"
            key = {"motion": row.motion, "layer": f"{layer}: {row.motion}", "rank": f"{rank}: {row.motion}"}[
                arguments.by
            ]
            sums.setdefault(key, LedgerRow(row.motion, layer)).add(row)
    if not sums:
        print("nothing crosses between processes: the run has one")
        return 0
    lines = [
        (
            name,
            str(row.calls),
            amount_of_bytes(row.bytes_sent),
            amount_of_bytes(row.bytes_received),
            f"{row.seconds_waited:.3f}",
        )
        for name, row in sorted(sums.items())
    ]
    print(f"step {step}, {len(processes)} processes, sums over them")
    print(columns((arguments.by.upper(), "CALLS", "SENT", "RECEIVED", "WAITED (s)"), lines))
    return 0


def _row(run: RunDirectory, notes: list[str]) -> tuple[str, ...]:
    """A line of `longstride runs`; of a run whose files cannot be read, what is wrong goes to `notes`."""
    try:
        experiment = Experiment.resume(run)
        info = run.read_info()
    except (ValueError, PermissionError) as error:
        notes.append(f"{run.name} is unreadable: {one_line(error)}")
        return (run.name, "unreadable", "-", "-", "-", "-", "-")
    last = next(newest_records(run.storage), None)
    measured = (record.validation_loss for record in newest_records(run.storage))
    validation_loss = next((loss for loss in measured if loss is not None), None)
    return (
        run.name,
        _state(last, experiment.train.steps, time.time(), ended="given_back" in (info.get("owner") or {})),
        f"{last.step if last else 0}/{experiment.train.steps}",
        f"{last.loss:.4f}" if last else "-",
        "-" if validation_loss is None else f"{validation_loss:.4f}",
        f"{experiment.stage_after(last.step if last else 0).context:,}",
        str(info.get("created", "-")),
    )


def _state(last: StepRecord | None, steps: int, now: float, *, ended: bool) -> str:
    """finished; stopped where its writer has `ended`; else running, as far as its last step lets one think."""
    if last is None:
        return "not started"
    if last.step >= steps:
        return "finished"
    return "running" if not ended and is_recent(last, now) else "stopped"


def _checked(overrides: list[str]) -> list[str]:
    """ValueError for words that are no override, before a file is read."""
    for word in overrides:
        if "=" not in word:
            raise ValueError(f"{word!r} is not a setting: write key=value, such as train.steps=100")
    return overrides
