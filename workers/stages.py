"""A run from stage to stage: every stage trains on a mesh of its own and begins with the checkpoint of the one before.

A change of the context is therefore a resume, whether the run was interrupted there or not: parameters, moments,
random state and the position in the data come from the checkpoint, the learning rate from the step. The processes and
their process group stay; the groups of parts of them are a stage's own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from ..data import Stage
from .experiment import Experiment
from .manifest import list_checkpoints
from .process_group import leave_groups
from .run_directory import RunDirectory
from .shared_outcomes import SharedOutcomes, gloo_group
from .trainer import Trainer


def train_stages(
    experiment: Experiment, run: RunDirectory, make: Callable[[Experiment, Stage], Trainer], *, resume: bool
) -> Trainer:
    """Trains all stages that are left; the trainer of the last one. Every process calls it.

    It ends early when asked to stop: the trainer has then made fewer than `train.steps` steps.

    Args:
        make: the trainer of a stage, with the experiment as it is there.
        resume: begin with the newest whole checkpoint.

    Raises what `Trainer.restore` and `Trainer.train` raise.
    """
    step = _committed_step(run) if resume else 0
    while True:
        stage = experiment.stage_after(step)
        trainer = make(experiment.at(stage), stage)
        if resume:
            trainer.restore()
        complete = trainer.train()
        step, resume = trainer.step_count, True
        if not complete or step >= experiment.train.steps:
            return trainer
        del trainer
        gc.collect()  # modules hold each other: the next stage's model needs the memory
        leave_groups()


def _committed_step(run: RunDirectory) -> int:
    """The step of the newest committed checkpoint, as the first process finds it; 0: there is none."""

    def newest() -> int:
        return max((checkpoint.step for checkpoint in list_checkpoints(run) if checkpoint.committed), default=0)

    return SharedOutcomes(gloo_group()).from_first(newest)
