"""`longstride track`: sends to MLflow what it does not have of a run's metrics.jsonl."""

from __future__ import annotations

from argparse import Namespace

from ..workers import Experiment, find_run
from ..workers.run_directory import code_version
from ..workers.tracking import one_line, send_all, tracking_uri
from .failures import RunFailed


def track(arguments: Namespace) -> int:
    """May be given another tracker (tracking.uri=...). RunFailed: MLflow cannot be reached, or refuses."""
    run = find_run(arguments.run)
    experiment = Experiment.resume(run, arguments.overrides)
    uri = tracking_uri(experiment.tracking, run)
    try:
        sent = send_all(run, experiment.tracking, experiment.settings(), code_version())
    except Exception as error:  # MLflow, its stores and its transport each have a family of errors
        raise RunFailed(f"MLflow at {uri} has not taken the records: {one_line(error)}") from error
    print(f"{sent} step{'s' if sent != 1 else ''} sent to MLflow at {uri}")
    return 0
