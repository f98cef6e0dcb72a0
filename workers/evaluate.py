"""What a trained run is worth: its weights on one process, and their loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..data import Corpus
from ..models import LanguageModel, build_model
from ..parallel import SequenceShard
from .checkpoint import load_weights
from .experiment import Experiment
from .manifest import newest_whole
from .run_directory import RunDirectory


@dataclass(frozen=True)
class TrainedModel:
    """A run's newest weights. `notes`: a line for every newer checkpoint that could not be used."""

    model: LanguageModel
    corpus: Corpus
    step: int
    tokens: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss in nats per token, over `tokens` targets of `sequences` sequences of `context` tokens."""

    step: int
    loss: float
    sequences: int
    tokens: int
    context: int

    @property
    def bits(self) -> float:
        """The loss in bits per token."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def load_run(run: RunDirectory, experiment: Experiment, device: str = "cpu") -> TrainedModel:
    """The model of the run's newest whole checkpoint, verified, whole on this process.

    ValueError: there is no such checkpoint, or it holds another model than the experiment's.
    """
    checkpoint, manifest, rejected = newest_whole(run)
    model = build_model(experiment.model, seed=experiment.seed, dtype=experiment.train.parameter_dtype, device=device)
    load_weights(checkpoint, model)
    return TrainedModel(model.eval(), experiment.open_corpus(), manifest.step, manifest.tokens, rejected)


@torch.inference_mode()
def evaluate(
    trained: TrainedModel, experiment: Experiment, progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Cross-entropy of the run's validation sequences, as training measures it; `progress(done, batches)` is told."""
    batches = experiment.data.validation(trained.corpus)
    device = trained.model.output_weight.device
    total, count = 0.0, 0
    for done, batch in enumerate(batches):
        progress(done, len(batches))
        shard = SequenceShard.whole(experiment.data.context, batch.document_starts)
        losses = trained.model(batch.tokens_BT.to(device), batch.targets_BT.to(device), shard)
        total += float(losses.cross_entropy) * batch.num_targets
        count += batch.num_targets
    progress(len(batches), len(batches))
    loss = total / max(1, count)
    return Evaluation(trained.step, loss, batches.num_sequences, count, experiment.data.context)
