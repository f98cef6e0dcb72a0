"""What one process sends and keeps, found by running its layers on a few tokens among processes that do not exist.

Every distinct layer of the model computes forward and backward on the CPU as a member of a sequence group. Its
messages go to a group that takes them and answers with zeros, so the counts are those of the code that will run, not
of formulas beside it. Bytes are measured at two short lengths and carried on in a straight line: every motion sends
either a number of bytes that does not depend on the length, or one for each token of the shard.

Experts are the exception: how many tokens travel depends on the router. Their part is computed for an even load.

Shapes: T tokens of a shard, D model width, M rows for experts, E experts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..models import ModelConfig, build_model, initialise, kept_in_float32
from ..models.block import Block
from ..models.experts import ExpertsOptions, MixtureOfExperts
from ..models.mixers.base import Shared
from ..models.mlp import default_hidden
from ..parallel import CommunicationLedger, Degrees, Link, SequenceShard, Strategies, run_experts
from ..parallel.groups import VirtualGroup

# Shards no longer than this are run as they are; longer ones are carried on from two lengths of this order.
SHORT = 128
SUMS, COUNTS, EXPERTS = "global_sum", "experts.counts", "experts"
# What is sent once for all sequences that are computed together.
PER_PASS = {SUMS, COUNTS}


@dataclass(frozen=True)
class Cost:
    """What one sequence costs one process.

    Attributes:
        sent: bytes by motion, directions together, of the member of the sequence group that sends most; those of
            PER_PASS are for any number of sequences.
        sent_after: likewise what is sent when a step ends, however it was computed.
        kept: bytes that each layer keeps for its backward pass, by the layer's label.
    """

    sent: Counter[str] = field(default_factory=Counter)
    sent_after: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)


class SilentGroup(VirtualGroup):
    """A member of a group whose other members do not exist: takes every message, answers zeros.

    With a `ledger` it counts sums over all processes, which go uncounted in virtual groups.
    """

    def __init__(self, rank: int, size: int, ledger: CommunicationLedger | None = None) -> None:
        self.rank, self._size, self._ledger = rank, size, ledger

    @property
    def size(self) -> int:
        return self._size

    def exchange(self, parts: Sequence[Tensor], receive_shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        if self._ledger is not None:
            self._ledger.record(SUMS, "", sent=parts[0].nbytes, received=parts[0].nbytes)
        return [parts[0].new_zeros(tuple(shape)) for shape in receive_shapes]

    def send(self, peer: int, x: Tensor) -> None: ...

    def receive(self, peer: int, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


class Rehearsal:
    """The layers of a model on the CPU, one of each kind.

    Args:
        dtype: of the parameters; compute_dtype: of the arithmetic where it differs (mixed precision).
        link: what cost models are to assume of the network.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, compute_dtype: torch.dtype | None, link: Link) -> None:
        self.config, self.dtype, self.link = config, compute_dtype or dtype, link
        model = build_model(config, dtype=dtype, device="meta")
        self.labels, self._like = model.labels, _twins(config)
        self._known: dict[tuple[int, Degrees, Strategies], Cost] = {}
        self._blocks: dict[int, Block] = {}
        for index in sorted(set(self._like)):
            block = model.blocks[index]
            assert isinstance(block, Block)
            self._blocks[index] = _on_cpu(block, compute_dtype)

    def cost(self, context: int, degrees: Degrees, strategies: Strategies) -> Cost:
        """Of a sequence of `context` tokens on this mesh."""
        length, least = context // degrees.sequence, self._least()
        if length <= least:
            cost = self._most(length, degrees, strategies)
        else:
            runs = [self._most(t, degrees, strategies) for t in (least, 2 * least)]
            cost = _carry_on(runs[0], runs[1], (length - least) / least)
        self._add_experts(cost, length, degrees.expert)
        return cost

    def _least(self) -> int:
        """Tokens of a shard from which on bytes grow in a straight line: no filter or chunk reaches further."""
        options = [self.config.mixer_options(layer).model_dump() for layer in self.config.plan]
        reach = [value for each in options for key in ("taps", "chunk") if isinstance(value := each.get(key), int)]
        return max([SHORT, *(1 << (value - 1).bit_length() for value in reach)])

    def _most(self, length: int, degrees: Degrees, strategies: Strategies) -> Cost:
        """Of the members in the middle, who send in both directions, the one that sends more. Run once."""
        if (length, degrees, strategies) not in self._known:
            middle = {(degrees.sequence - 1) // 2, degrees.sequence // 2}
            costs = [self._run(length, rank, degrees, strategies) for rank in middle]
            self._known[length, degrees, strategies] = max(costs, key=lambda cost: cost.sent.total())
        known = self._known[length, degrees, strategies]
        return Cost(known.sent.copy(), known.sent_after.copy(), known.kept.copy())

    def _run(self, length: int, rank: int, degrees: Degrees, strategies: Strategies) -> Cost:
        ledger = CommunicationLedger()
        shard = SequenceShard.split(
            length * degrees.sequence,
            SilentGroup(rank, degrees.sequence),
            token_group=SilentGroup(0, degrees.workers, ledger),
            ledger=ledger,
            strategies=strategies,
        )
        shard = replace(shard, link=self.link)
        sent: dict[int, Counter[str]] = {}
        sent_after: dict[int, Counter[str]] = {}
        kept: dict[int, int] = {}
        shared: Shared = {}
        for index, block in self._blocks.items():
            x_BTD = torch.randn(1, length, self.config.width, dtype=self.dtype, requires_grad=True)
            saved = Kept(block)
            with saved:
                block.compute(x_BTD, shard, shared)
            kept[index] = saved.total
            ledger.reset()
            y_BTD, loss, added = block(x_BTD, shard, shared)
            (y_BTD.float().sum() + loss).backward()
            sent[index] = _bytes_sent(ledger)
            block.end_step()
            sent_after[index] = _bytes_sent(ledger)
            block.zero_grad()
            shared = {**shared, **{name: value.detach() for name, value in added.items()}}
        cost = Cost()
        for label, index in zip(self.labels, self._like, strict=True):
            cost.sent.update(sent[index])
            cost.sent_after.update(sent_after[index])
            cost.kept[label] = kept[index]
        return cost

    def _add_experts(self, cost: Cost, length: int, degree: int) -> None:
        """What evenly loaded experts exchange and keep. Rows go and come back, in both passes."""
        again = 2 if self.config.recompute else 1
        for layer, label in zip(self.config.plan, self.labels, strict=True):
            options = self.config.feed_forward_options(layer)
            if not isinstance(options, ExpertsOptions):
                continue
            width, here = self.config.width, options.experts // degree
            hidden = options.hidden or default_hidden(width, gated=True)
            cost.kept[label] += length * options.top_k * (width + 3 * hidden) * self.dtype.itemsize
            if degree == 1:
                continue
            # a token goes once to each process that holds any of its experts: all but those whose experts it missed
            missed = math.comb(options.experts - here, options.top_k) / math.comb(options.experts, options.top_k)
            moved = round(length * (degree - 1) * (1 - missed))
            routing = options.top_k * (1 if here < 256 else 4)
            cost.sent[EXPERTS] += moved * again * (routing + (2 * width + options.top_k) * self.dtype.itemsize)
            cost.sent[EXPERTS] += moved * (2 * width + options.top_k) * self.dtype.itemsize
            cost.sent[COUNTS] += again * (degree - 1) * torch.int64.itemsize


def motion_family(motion: str) -> str:
    """A motion of the ledger without its direction."""
    return motion.removesuffix(".forward").removesuffix(".backward")


class _NoExperts(nn.Module):
    """Stands for the experts of a layer, whose weights may be most of the model."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_ND: Tensor, expert_NJ: Tensor, weight_NJ: Tensor, shard: SequenceShard) -> Tensor:
        return run_experts(x_ND, expert_NJ, weight_NJ, lambda x_MD, counts_E: x_MD, self.num_experts, shard)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps inside, parameters left out and nothing twice."""

    def __init__(self, block: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        self._storages: dict[int, Tensor] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._parameters:
            self._storages[place] = tensor
        return tensor

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._storages.values())


def _twins(config: ModelConfig) -> list[int]:
    """For each layer the earliest that costs the same: same description, and both or neither first of their family."""
    seen: dict[tuple[str, bool], int] = {}
    twins: list[int] = []
    for index, layer in enumerate(config.plan):
        first = all(earlier.mixer != layer.mixer for earlier in config.plan[:index])
        twins.append(seen.setdefault((repr(layer), first), index))
    return twins


def _on_cpu(block: Block, compute_dtype: torch.dtype | None) -> Block:
    if isinstance(block.feed_forward, MixtureOfExperts):
        block.feed_forward.experts = _NoExperts(block.feed_forward.options.experts)  # pyright: ignore[reportAttributeAccessIssue]
    block.to_empty(device="cpu")
    initialise(block, seed=0)
    kept = kept_in_float32(block)
    for parameter in block.parameters() if compute_dtype is not None else ():
        if parameter not in kept:
            parameter.data = parameter.data.to(compute_dtype)
    return block


def _bytes_sent(ledger: CommunicationLedger) -> Counter[str]:
    """By motion, since the last call."""
    sent: Counter[str] = Counter()
    for row in ledger.rows():
        sent[motion_family(row.motion)] += row.bytes_sent
    ledger.reset()
    return sent


def _carry_on(first: Cost, second: Cost, factor: float) -> Cost:
    """The straight line through both: `first` where `factor` is 0, `second` where it is 1."""

    def line(a: int, b: int) -> int:
        return round(a + (b - a) * factor)

    return Cost(
        Counter({key: line(first.sent[key], second.sent[key]) for key in first.sent | second.sent}),
        second.sent_after,
        Counter({key: line(first.kept[key], second.kept[key]) for key in second.kept}),
    )
