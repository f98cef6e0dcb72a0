"""`longstride import` and `longstride export`: checkpoints of other software, in and out; also under torchrun."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TypeVar

from ..workers import Experiment, find_run
from ..workers.interchange import export_run, import_run, imported_experiment
from . import launcher
from .failures import EchoOfMistake, is_mistake

ResultT = TypeVar("ResultT")


def import_(arguments: Namespace) -> int:
    """Every process of a launcher comes here; the first one speaks."""

    def work() -> str:
        words = launcher.with_own_workers(arguments.overrides, "import")
        experiment = imported_experiment(arguments.directory, arguments.out, words)
        return import_run(arguments.directory, experiment, launcher.rank()).url

    url = _spoken_once(work)
    if launcher.rank() == 0:
        print(f"{url} holds the weights of {arguments.directory} as step 0")
        print(f"longstride generate {url} --prompt TEXT")
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
