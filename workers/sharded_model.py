"""A model whose parameters are spread over the processes of a run from the start."""

from __future__ import annotations

from ..models import LanguageModel, build_model, initialise, kept_in_float32
from ..parallel import CommunicationLedger, Mesh, shard_model
from .experiment import Experiment
from .trained_parameters import freeze


def make_sharded_model(
    experiment: Experiment, mesh: Mesh, *, filled: bool = True, ledger: CommunicationLedger | None = None
) -> LanguageModel:
    """The experiment's model, sharded, with its initial values or not `filled`. No process ever holds all of it.

    One process in one precision has nothing to gather: its parameters stay plain, for the same numbers in less time.

    `ledger`: where the messages of its parameters are counted.
    """
    train = experiment.train
    model = build_model(experiment.model, dtype=train.parameter_dtype, device="meta")
    freeze(model, train)
    if mesh.world_size > 1 or train.compute_dtype is not None:
        shard_model(
            model,
            mesh,
            blocks=list(model.blocks),
            experts=model.expert_modules(),
            param_dtype=train.compute_dtype,
            float32=kept_in_float32(model),
            forward_methods=("loss", "logits", "scores"),
            ledger=ledger,
            labels=model.labels,
        )
    model.to_empty(device=mesh.device)
    if filled:
        initialise(model, experiment.seed)
    return model
