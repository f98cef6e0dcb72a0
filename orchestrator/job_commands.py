"""The commands about jobs on a cluster, and `prepare`. Every function takes parsed arguments, returns the exit code."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ..data import Progress as Progressed
from ..data import prepare as prepare_corpus
from ..workers import Experiment
from ..workers.display import count, duration
from .tables import columns

if TYPE_CHECKING:
    from .jobs import Jobs

# A job's state and exit code of `--follow`.
_CODES = {"SUCCEEDED": 0, "STOPPED": 143}
LINE_SECONDS = 10.0


def submit(arguments: Namespace) -> int:
    jobs = _jobs(arguments)
    experiment = Experiment.load(arguments.config, arguments.overrides)
    name = jobs.submit(experiment, python=arguments.python)
    run = f"{experiment.run.directory.rstrip('/')}/{experiment.run.name}"
    print(name if not arguments.follow else f"job {name}", flush=True)
    print(f"run:  {run}", file=sys.stderr)
    if "://" not in experiment.run.directory:
        print("note: every node must see that path; run.directory=s3://... needs no shared disk", file=sys.stderr)
    return _follow(jobs, name) if arguments.follow else 0


def status(arguments: Namespace) -> int:
    jobs = _jobs(arguments)
    found = [jobs.get(arguments.job)] if arguments.job else jobs.list()
    if not found:
        print("no jobs")
        return 0
    print(columns(("JOB", "STATE", "STARTED", "RUN"), [_row(job) for job in found]))
    if arguments.job and found[0].message:
        print(found[0].message.strip().splitlines()[-1])
    return 0


def logs(arguments: Namespace) -> int:
    jobs = _jobs(arguments)
    if arguments.follow:
        return _follow(jobs, arguments.job)
    print(jobs.logs(arguments.job), end="")
    return 0


def stop(arguments: Namespace) -> int:
    jobs = _jobs(arguments)
    before = jobs.get(arguments.job)
    if before.status.is_terminal():
        print(f"job {arguments.job} has ended already: {before.status.value.lower()}")
        return 0
    print("asked to write a checkpoint and leave ...", file=sys.stderr)
    after = jobs.stop(arguments.job, arguments.timeout)
    print(f"job {arguments.job}: {after.value.lower()}")
    return 0 if after.is_terminal() else 1


def prepare(arguments: Namespace) -> int:
    names = ("tokenizer", "vocab_size", "separator", "sample_rate", "format", "field")
    names += ("validation", "holdout", "workers", "overwrite")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    made = prepare_corpus(arguments.sources, arguments.out, **given, progress=_Bar())
    tokens = ", ".join(f"{count(number)} tokens {split}" for split, number in made.num_tokens.items())
    documents = ", ".join(f"{number:,} {split}" for split, number in made.num_documents.items())
    print(f"prepared {made.url}: {tokens} in {made.num_shards} shards after {duration(made.seconds)}")
    why = " (all sources are FASTA)" if made.tokenizer == "dna" and arguments.tokenizer is None else ""
    print(f"tokenizer {made.tokenizer}{why}, vocabulary {made.vocab_size}; documents: {documents}")
    print(f"train on it: data.corpus={made.url} model.vocab_size={made.vocab_size}")
    return 0


class _Bar:
    """Shows how far a preparation is: one live line on a terminal, a plain one now and then elsewhere."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, progress: Progressed) -> None:
        share = progress.source_bytes_done / max(1, progress.source_bytes)
        left = progress.seconds * (1 - share) / share if share else 0.0
        filled = round(20 * share)
        line = (
            f"{'━' * filled}{'╌' * (20 - filled)} {share:4.0%}  part {progress.parts_done}/{progress.num_parts}  "
            f"{count(progress.num_documents)} documents  {count(progress.num_tokens)} tokens  left {duration(left)}"
        )
        done = progress.parts_done == progress.num_parts
        if sys.stderr.isatty():
            print(f"\r\033[K{line}" + ("\n" if done else ""), end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            print(line, file=sys.stderr)


def _jobs(arguments: Namespace) -> Jobs:
    from .jobs import Jobs

    return Jobs(arguments.address)


def _follow(jobs: Jobs, name: str) -> int:
    """Prints a job's output until it ends; 0 if that was a success. Ctrl-C ends the following, not the job."""
    try:
        for piece in jobs.follow(name):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(f"\njob {name} goes on; follow it again: longstride logs {name} -f --address {jobs.address}")
        return 0
    state = jobs.wait(name, 10).value
    print(f"job {name}: {state.lower()}", file=sys.stderr)
    return _CODES.get(state, 1)


def _row(job: Any) -> tuple[str, ...]:
    started = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (job.submission_id, job.status.value.lower(), started, (job.metadata or {}).get("run", "-"))
