"""`longstride evaluate`: how well a run's weights foretell held-out data."""

from __future__ import annotations

import sys
from argparse import Namespace

from ..data import TASKS
from ..workers import Experiment, find_run
from ..workers.evaluate import Evaluation
from ..workers.evaluate import evaluate as measure
from ..workers.scoring import LengthScore
from . import launcher
from .failures import EchoOfMistake, is_mistake, one_line
from .tables import columns

# However the run was trained: its sequences are split over the processes that there are now, which may be one.
_HERE = ("parallel.replicate=1", "parallel.data=1", "parallel.expert=auto", "train.canonical=0", "data.schedule=null")


def evaluate(arguments: Namespace) -> int:
    """Every process of a launcher comes here; the first one speaks."""
    first = launcher.rank() == 0
    try:
        run = find_run(arguments.run)
        words = launcher.with_own_workers(arguments.overrides, "evaluate")
        workers = words[-1].partition("=")[2]
        experiment = Experiment.resume(run, [*_HERE, f"parallel.sequence={workers}", *words], any_corpus=True)
        progress = _progress if first else _silent
        result = measure(experiment, run, launcher.rank(), checkpoint=arguments.checkpoint, progress=progress)
    except Exception as error:
        if not first and is_mistake(error):
            raise EchoOfMistake(one_line(error)) from None
        raise
    if first:
        _report(result, experiment)
    return 0


def _report(result: Evaluation, experiment: Experiment) -> None:
    for line in result.notes:
        print(f"note: {line}", file=sys.stderr)
    print(f"step               {result.step}")
    task = experiment.data.corpus in TASKS if isinstance(experiment.data.corpus, str) else False
    if len(result.scores) > 1:
        header = ("LENGTH", "SEQUENCES", "TARGETS", "CORRECT", "ACCURACY", "LOSS", "PERPLEXITY")
        print(columns(header, [_row(score) for score in result.scores]))
    else:
        _report_one(result.scores[0])
    if not task:
        longest = max(result.scores, key=lambda score: score.context)
        rows = [(f"{each.start:,}-{each.stop - 1:,}", f"{each.loss:.4f}") for each in longest.stretches]
        print(columns((f"POSITION OF {longest.context:,}", "LOSS"), rows))


def _row(score: LengthScore) -> tuple[str, ...]:
    counts = (f"{score.context:,}", f"{score.sequences}", f"{score.tokens:,}", f"{score.correct:,}")
    return (*counts, f"{score.accuracy:.2%}", f"{score.loss:.4f}", f"{score.perplexity:.3f}")


def _report_one(score: LengthScore) -> None:
    print(f"held-out tokens    {score.tokens:,} in {score.sequences} sequences of {score.context:,}")
    print(f"loss               {score.loss:.4f} nats per token")
    print(f"                   {score.bits:.4f} bits per token")
    print(f"perplexity         {score.perplexity:.3f}")
    print(f"accuracy           {score.accuracy:.2%} ({score.correct:,} of {score.tokens:,} targets)")


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} batches" + ("\r\033[K" if done == total else ""), end="", file=sys.stderr, flush=True)


def _silent(done: int, total: int) -> None:
    pass
