"""What a run will take: memory, arithmetic and messages of one process, for every stage of its context.

Counts are those of the code (see `rehearsal`) and of the parameters' shapes. Not in them: what the allocator and the
libraries take for themselves, buffers of messages, the sums of `train.canonical`, and on the CPU the interpreter.
Frozen parameters have neither gradients nor moments; activations, arithmetic and layers' own messages are counted as if
all were trained.

Shapes: V vocabulary, D model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from ..data import Stage
from ..models import LanguageModel, build_model, kept_in_float32
from ..models.block import Block
from ..parallel import Degrees, Link
from ..workers import Experiment
from ..workers.metrics import PASSES
from ..workers.trained_parameters import freeze
from .rehearsal import PER_PASS, SUMS, Rehearsal

# Of the matrix of logits, `linear_cross_entropy` holds so many rows.
LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Forecast:
    """One stage, one process.

    Attributes:
        flops: of a step, all processes together.
        sequences: of a step that a process holds a part of; `at_once`: of which it computes so many together.
        memory: bytes by what they are for; those of the process that holds most.
        sent: bytes of a step by motion, of the process that sends most.
    """

    stage: Stage
    degrees: Degrees
    flops: float
    sequences: int
    at_once: int
    memory: dict[str, int]
    sent: Counter[str]

    @property
    def tokens(self) -> int:
        """Of a step, on one process."""
        return self.stage.context // self.degrees.sequence * self.sequences


def forecast(experiment: Experiment, device: str) -> Iterator[Forecast]:
    """Each stage's, in order. `device`: "cpu" or "cuda", for what cost models assume of the network."""
    train = experiment.train
    link = Link.for_backend("nccl" if device == "cuda" else "gloo")
    rehearsal = Rehearsal(experiment.model, train.parameter_dtype, train.compute_dtype, link)
    model = build_model(experiment.model, dtype=train.parameter_dtype, device="meta")
    freeze(model, train)
    passes = PASSES + 1 if experiment.model.recompute else PASSES
    for stage in experiment.stages:
        now = experiment.at(stage)
        degrees = now.degrees
        cost = rehearsal.cost(stage.context, degrees, now.parallel.strategies)
        sequences = stage.batch // (degrees.replicate * degrees.data)
        at_once = sequences // train.accumulate
        sent = Counter(cost.sent_after)
        for motion, bytes_sent in cost.sent.items():
            sent[motion] += bytes_sent * (train.accumulate if motion in PER_PASS else sequences)
        tokens = stage.context // degrees.sequence * at_once
        memory, traffic = _parameters(model, now, degrees)
        sent.update({motion: count * train.accumulate for motion, count in traffic.items()})
        if degrees.workers > 1:
            # the summed loss of every part, and the number of targets where it is counted
            sent[SUMS] += max(rehearsal.dtype.itemsize, torch.float32.itemsize) * train.accumulate
            sent[SUMS] += torch.float64.itemsize if train.accumulate == 1 else 0
        width = tokens * experiment.model.width * rehearsal.dtype.itemsize
        kept = [count * at_once for count in cost.kept.values()]
        memory["activations"] = width * len(kept) + max(kept) if experiment.model.recompute else sum(kept)
        memory["loss"] = _loss(model, tokens, rehearsal.dtype)
        flops = passes * model.flops_per_token(stage.context) * stage.context * stage.batch
        yield Forecast(stage, degrees, flops, sequences, at_once, memory, +sent)


def _loss(model: LanguageModel, tokens: int, dtype: torch.dtype) -> int:
    """Embedded tokens, hidden states and their gradient; the logits of some tokens; the output layer's gradient."""
    vocabulary, width = model.output_weight.shape
    wide = max(dtype.itemsize, torch.float32.itemsize)
    rows = min(LOGIT_ROWS, tokens)
    gradient = vocabulary * width * wide if model.output_weight.requires_grad else 0
    return 3 * tokens * width * dtype.itemsize + rows * vocabulary * (wide + dtype.itemsize) + gradient


@dataclass(frozen=True)
class _Unit:
    """Parameters that are gathered together, in one dtype, for a layer to compute with.

    Attributes:
        trained: how many of their shapes, the first ones, are of parameters that are not frozen.
        share: processes over which they are sharded, in dimension `dim`; experts are spread over `spread` before.
        again: they are gathered once more in the backward pass.
    """

    shapes: list[torch.Size]
    trained: int
    itemsize: int
    share: int
    dim: int = 0
    spread: int = 1
    again: bool = True

    @property
    def local(self) -> int:
        """Numbers that every process holds; a dimension that does not divide is filled up."""
        return self._held(self.shapes)

    @property
    def local_trained(self) -> int:
        """Those of them that have gradients."""
        return self._held(self.shapes[: self.trained])

    def _held(self, shapes: list[torch.Size]) -> int:
        counts = (-(-shape[self.dim] // self.share) * (prod(shape) // shape[self.dim]) for shape in shapes)
        return sum(counts) // self.spread

    @property
    def gathered(self) -> int:
        """Bytes of the whole."""
        return self.local * self.share * self.itemsize


def _parameters(model: LanguageModel, experiment: Experiment, degrees: Degrees) -> tuple[dict[str, int], Counter[str]]:
    """Memory of parameters and what is kept beside them, and FSDP's messages of a step."""
    stored = experiment.train.parameter_dtype.itemsize
    if experiment.train.canonical:
        whole = model.num_parameters() * stored
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * stored
        return {"parameters": whole, "gradients": trained, "optimiser": 2 * trained}, Counter()
    units = [*_units(model, experiment.train.compute_dtype, degrees, stored)]
    local, trained = sum(unit.local for unit in units) * stored, sum(unit.local_trained for unit in units) * stored
    layers = [unit.gathered for unit in units if unit.again]
    # A layer computes while the next one is gathered, and its gradients are summed in the stored dtype.
    computing = 3 * max(layers) + sum(unit.gathered for unit in units if not unit.again)
    sent: Counter[str] = Counter()
    for unit in units:
        others = unit.share - 1
        sent["fsdp.all_gather"] += unit.local * others * unit.itemsize * (2 if unit.again else 1)
        sent["fsdp.reduce_scatter"] += unit.local_trained * others * stored
        sent["fsdp.all_reduce"] += unit.local_trained * stored if degrees.replicate > 1 else 0
    memory = {"parameters": local, "gradients": trained, "optimiser": 2 * trained}
    return memory | {"gathered layers": computing if units[0].share > 1 else 0}, sent


def _units(model: LanguageModel, compute: torch.dtype | None, degrees: Degrees, stored: int) -> Iterator[_Unit]:
    """What `shard_model` makes of the model: layers, experts apart where they are spread, then what is left."""
    everywhere = degrees.data * degrees.sequence
    wide = kept_in_float32(model) if compute is not None else set[nn.Parameter]()
    seen = set[nn.Parameter]()

    def units(module: nn.Module, share: int, dim: int = 0, spread: int = 1, again: bool = True) -> Iterator[_Unit]:
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        for kept in (False, True):
            alike = [parameter for parameter in own if (parameter in wide) == kept]
            trained = [parameter.shape for parameter in alike if parameter.requires_grad]
            frozen = [parameter.shape for parameter in alike if not parameter.requires_grad]
            itemsize = stored if kept or compute is None else compute.itemsize
            if alike:
                yield _Unit(trained + frozen, len(trained), itemsize, share, dim, spread, again)

    experts, reached = set(model.expert_modules()), _first_reached(model)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for module in block.modules() if degrees.expert > 1 else ():
            if module in experts:
                yield from units(module, everywhere // degrees.expert, 1, degrees.expert, again=index >= reached)
        # The backward pass asks for the block before the one that it is in, whether it will get there or not.
        yield from units(block, everywhere, again=index >= reached - 1)
    yield from units(model, everywhere, again=False)


def _first_reached(model: LanguageModel) -> int:
    """The number of the first block that the backward pass enters: all before it is frozen."""
    begin = [model.embedding, *([] if model.embedding_norm is None else [model.embedding_norm])]
    trained = (any(parameter.requires_grad for parameter in part.parameters()) for part in (*begin, *model.blocks))
    first = next((number for number, asks in enumerate(trained) if asks), len(begin) + len(model.blocks))
    return max(0, first - len(begin))
