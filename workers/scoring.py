"""Held-out data of one length, scored: loss, accuracy, and the loss by position; on one process or as one of several.

Shapes: B rows and T tokens of this process, K stretches of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from torch import Tensor

from ..data import Corpus, DataConfig, Task
from ..data.config import Length
from ..models import LanguageModel
from ..parallel import Mesh, SequenceShard
from .configuration import Settings

# The first stretch of positions whose loss is reported by itself; each further one is as long as all before it.
FIRST_STRETCH = 64


class EvaluateConfig(Settings):
    """What `longstride evaluate` measures.

    Attributes:
        lengths: of the held-out sequences, one after the other, such as [1024, 32k]; none: `data.context`, as training
            validates.
        sequences: held-out sequences of each of `lengths`, at most.
        tokens: of all sequences of one length, at most; one sequence is always scored.
    """

    lengths: tuple[Annotated[Length, Field(ge=1)], ...] = ()
    sequences: int = Field(default=64, ge=1)
    tokens: int = Field(default=1 << 22, ge=1)

    @field_validator("lengths", mode="before")
    @classmethod
    def _one_is_a_list(cls, lengths: Any) -> Any:
        return (lengths,) if isinstance(lengths, (int, str)) else lengths


@dataclass(frozen=True)
class Stretch:
    """Positions [start, stop) of every sequence: mean loss in nats, over so many targets."""

    start: int
    stop: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class LengthScore:
    """Sequences of `context` tokens: mean loss in nats over `tokens` targets, `correct` of them the likeliest token."""

    context: int
    sequences: int
    tokens: int
    loss: float
    correct: int
    stretches: tuple[Stretch, ...]

    @property
    def accuracy(self) -> float:
        """The share of targets that are the likeliest token."""
        return self.correct / max(1, self.tokens)

    @property
    def bits(self) -> float:
        """The loss in bits per token."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def at_length(data: DataConfig, config: EvaluateConfig, length: int, copies: int = 1) -> DataConfig:
    """`data` for held-out sequences of another length: as many tokens in a batch, a batch divisible by `copies`."""
    sequences = max(1, min(config.sequences, config.tokens // length))
    rows = min(sequences, max(1, data.batch * data.context // length))
    batch = -(-rows // copies) * copies
    return data.model_copy(update={"context": length, "batch": batch, "validation_sequences": sequences})


@torch.no_grad()
def score_length(
    model: LanguageModel,
    data: DataConfig,
    corpus: Corpus,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LengthScore:
    """The score of `data`'s held-out sequences; the same on every process of `mesh`, which each read their part.

    Args: progress: told (batches done, batches in all).
    """
    if isinstance(corpus, Task):
        corpus = data.open()  # its examples are of the context's length
    whole = mesh.shard(data.context) if mesh else SequenceShard.whole(data.context)
    share = {"data_rank": mesh.data_rank, "data_size": mesh.data_size} if mesh else {}
    batches = data.validation(corpus, bounds=(whole.start, whole.stop), **share)
    edges_K = stretch_edges(data.context)
    positions_T = torch.arange(whole.start, whole.stop)
    stretch_T = torch.bucketize(positions_T, edges_K[1:], right=True)
    totals_K3 = torch.zeros(len(edges_K) - 1, 3, dtype=torch.float64)  # loss, targets, correct ones
    device = model.output_weight.device
    for done, batch in enumerate(batches):
        progress(done, len(batches))
        starts = batch.document_starts if any(batch.document_starts) else None
        shard = mesh.shard(data.context, starts) if mesh else SequenceShard.whole(data.context, starts)
        scores = model.scores(batch.tokens_BT.to(device), batch.targets_BT.to(device), shard)
        counted = batch.targets_BT != -100
        for which, values_BT in enumerate((scores.loss_BT.cpu(), counted, scores.correct_BT.cpu())):
            totals_K3[:, which].index_add_(0, stretch_T, values_BT.sum(0).double())
    progress(len(batches), len(batches))
    if mesh is not None and mesh.world_size > 1:
        dist.all_reduce(totals_K3)
    return _result(data.context, batches.num_sequences, edges_K.tolist(), totals_K3)


def stretch_edges(length: int) -> Tensor:
    """0, 64, 128, 256, ... and the length: int64, (K + 1,)."""
    edges, stop = [0], FIRST_STRETCH
    while stop < length:
        edges.append(stop)
        stop *= 2
    return torch.tensor([*edges, length])


def _result(context: int, sequences: int, edges: list[int], totals_K3: Tensor) -> LengthScore:
    rows = [(start, stop, *row) for start, stop, row in zip(edges, edges[1:], totals_K3.tolist(), strict=False)]
    stretches = tuple(Stretch(start, stop, loss / n, round(n)) for start, stop, loss, n, _ in rows if n)
    loss, tokens, correct = totals_K3.sum(0).tolist()
    return LengthScore(context, sequences, round(tokens), loss / max(1.0, tokens), round(correct), stretches)
