"""`longstride import` and `longstride export`: weights of other software or of another run, in and out."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..data import MuLawTokenizer
from ..data.tokenizer_files import TOKENIZER
from ..workers import Experiment, RunDirectory, find_run
from ..workers.checkpoint_policy import LATEST
from ..workers.descent import descend, descendant
from ..workers.display import command, generate_command, shorten
from ..workers.interchange import export_run, import_run, imported_experiment
from ..workers.run_directory import run_at
from ..workers.run_tokenizer import kept_tokenizer
from . import launcher
from .failures import EchoOfMistake, is_mistake, one_line

ResultT = TypeVar("ResultT")


def import_(arguments: Namespace) -> int:
    """Every process of a launcher comes here; the first one speaks."""
    source, out, checkpoint = arguments.directory, arguments.out, arguments.checkpoint

    def work() -> tuple[RunDirectory, str, list[str]]:
        parent = run_at(source)
        if parent is not None:
            experiment, rank = descendant(parent, out, arguments.overrides), launcher.rank()
            run, step, notes = descend(parent, experiment, rank, launcher.world_size(), checkpoint=checkpoint)
            return run, f"of {parent.name} after step {step}", notes
        words = launcher.with_own_workers(arguments.overrides, "import")
        experiment = imported_experiment(source, out, words)
        if checkpoint != LATEST:
            raise ValueError(
                f"--checkpoint {checkpoint}: {source} is no run, and holds one checkpoint alone; leave it out"
            )
        return import_run(source, experiment, launcher.rank()), f"of {source}", []

    run, whose, notes = _spoken_once(work)
    if launcher.rank() == 0:
        for line in notes:
            print(f"note: {line}", file=sys.stderr)
        own = kept_tokenizer(run)
        print(f"{shorten(run.url)} holds the weights {whose} as step 0" + (", and its tokenizer" if own else ""))
        print(f"train:    {command('longstride', 'resume', shorten(run.url))} [data.corpus=CORPUS] [key=value ...]")
        audio = own is not None and isinstance(own.open(), MuLawTokenizer)
        print(f"generate: {generate_command(shorten(run.url), audio=audio)}")
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
        own = ", and its tokenizer" if (Path(arguments.out) / TOKENIZER).is_file() else ""
        print(f"{arguments.out} holds the run's weights after step {step} as {arguments.layout}{own}")
    return 0


def _spoken_once(work: Callable[[], ResultT]) -> ResultT:
    """A mistake that all processes find is told by the first."""
    try:
        return work()
    except Exception as error:
        if launcher.rank() != 0 and is_mistake(error):
            raise EchoOfMistake(one_line(error)) from None
        raise
