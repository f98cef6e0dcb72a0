"""`longstride import` and `longstride export`: weights of other software or of another run, in and out."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TypeVar

from ..workers import Experiment, RunDirectory, find_run
from ..workers.descent import descend, descendant
from ..workers.display import command, shorten
from ..workers.interchange import export_run, import_run, imported_experiment
from ..workers.run_directory import run_at
from ..workers.run_tokenizer import TOKENIZER_FILE
from . import launcher
from .failures import EchoOfMistake, is_mistake

ResultT = TypeVar("ResultT")


def import_(arguments: Namespace) -> int:
    """Every process of a launcher comes here; the first one speaks."""
    source, out = arguments.directory, arguments.out

    def work() -> tuple[RunDirectory, str]:
        parent = run_at(source)
        if parent is not None:
            experiment = descendant(parent, out, arguments.overrides)
            run, step = descend(parent, experiment, launcher.rank(), launcher.world_size())
            return run, f"of {parent.name} after step {step}"
        words = launcher.with_own_workers(arguments.overrides, "import")
        run = import_run(source, imported_experiment(source, out, words), launcher.rank())
        return run, f"of {source}"

    run, whose = _spoken_once(work)
    if launcher.rank() == 0:
        own = run.storage.exists(TOKENIZER_FILE)
        print(f"{shorten(run.url)} holds the weights {whose} as step 0" + (", and its tokenizer" if own else ""))
        print(f"train:    {command('longstride', 'resume', shorten(run.url))} [data.corpus=CORPUS] [key=value ...]")
        print(f"generate: {command('longstride', 'generate', shorten(run.url), '--prompt', 'TEXT')}")
    return 0


def export(arguments: Namespace) -> int:
    """As `import_`."""

    def work() -> tuple[int, list[str]]:
        run = find_run(arguments.run)
        words = launcher.with_own_workers([], "export")
        degrees = [f"parallel.{axis}=auto" for axis in ("data", "sequence", "expert")]
        experiment = Experiment.resume(
            run, ["train.canonical=0", "data.batch=1", "parallel.replicate=1", *degrees, *words]
        )
        out, layout = arguments.out, arguments.layout
        return export_run(run, experiment, out, layout, launcher.rank(), checkpoint=arguments.checkpoint)

    step, notes = _spoken_once(work)
    if launcher.rank() == 0:
        for line in notes:
            print(f"note: {line}", file=sys.stderr)
        print(f"{arguments.out} holds the run's weights after step {step} as {arguments.layout}")
    return 0


def _spoken_once(work: Callable[[], ResultT]) -> ResultT:
    """A mistake that all processes find is told by the first."""
    try:
        return work()
    except Exception as error:
        if launcher.rank() != 0 and is_mistake(error):
            raise EchoOfMistake from None
        raise
