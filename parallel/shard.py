"""A sequence shard is a value: which part of which global sequences this process holds.

It is handed explicitly to every mixer. One process without any process group is `SequenceShard.whole`.

Shapes: B batch, T tokens of this shard, L tokens of the whole sequence, P processes of the sequence group.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from .agreement import DocumentStarts, Geometry, agreed
from .groups import Group, VirtualGroup, group_rank, group_size
from .ledger import CommunicationLedger


@dataclass(frozen=True)
class Strategies:
    """How each motion travels: "auto" (its cost model chooses) or a name that the motion's documentation lists."""

    prefix: str = "auto"
    attention: str = "auto"
    convolution: str = "auto"


@dataclass(frozen=True)
class Link:
    """What the cost models assume of the network: seconds per message, bytes per second and process.

    The defaults are gloo on one machine, measured; for NCCL see `Link.for_backend`.
    """

    latency: float = 4e-4
    bytes_per_second: float = 1e9
    bytes_per_second_in_node: float = 1e9

    @classmethod
    def for_backend(cls, backend: str) -> Link:
        """Assumptions for a torch.distributed backend; "cpu:gloo,cuda:nccl" is NCCL where it matters."""
        return cls(2e-5, 4e10, 3e11) if "nccl" in backend else cls()


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """Tokens [start, stop) of sequences of `length` tokens, contiguous and in rank order.

    Attributes:
        bounds: P + 1 ascending offsets; rank r holds tokens [bounds[r], bounds[r + 1]).
        rank: this process's place along the sequence.
        group: the processes that hold the other parts; None when P is 1.
        document_starts: for every row of the batch (or one entry for all rows) the ascending global positions at
            which a document begins. Position 0 always begins one. None: every row is one document.
        token_group: all processes that hold tokens of this step (data x sequence x replicate); None when this
            process holds them all.
        expert_group: the processes over which experts are spread; None when every expert is here.
        ledger: where motions report; each motion names `layer` there.
        strategies: how each motion travels.
        link: what cost models assume of the network.
        node_size: neighbouring ranks on one machine; None when all are.
        checked: length, bounds and documents were compared over the group, and every message is first compared with
            what its receivers expect, so that mismatched ranks raise one error on every rank instead of hanging; a
            small collective per message.
    """

    bounds: tuple[int, ...]
    rank: int = 0
    group: Group | None = None
    document_starts: DocumentStarts | None = None
    token_group: Group | None = None
    expert_group: Group | None = None
    ledger: CommunicationLedger = field(default_factory=CommunicationLedger)
    layer: str = ""
    strategies: Strategies = Strategies()
    link: Link = Link()
    node_size: int | None = None
    checked: bool = False

    @classmethod
    def whole(cls, length: int, document_starts: object = None) -> SequenceShard:
        """The one-process case: all `length` tokens are here; no process group is needed.

        `document_starts`: see `parse_document_starts`.
        """
        return cls(
            bounds=even_bounds(length, 1),
            document_starts=parse_document_starts(document_starts, length),
        )

    @classmethod
    def split(
        cls,
        length: int,
        group: Group | None = None,
        document_starts: object = None,
        *,
        bounds: Sequence[int] | None = None,
        token_group: Group | None = None,
        expert_group: Group | None = None,
        ledger: CommunicationLedger | None = None,
        strategies: Strategies | None = None,
        node_size: int | None = None,
        checked: bool = False,
    ) -> SequenceShard:
        """This process's part of sequences of `length` tokens split over `group` in rank order.

        Args:
            length: tokens of the whole sequence.
            group: the sequence group; None means, as in torch, the default group, or one process where
                torch.distributed is not initialised.
            document_starts: see `parse_document_starts`.
            bounds: P + 1 offsets for shards of chosen sizes; by default sizes differ by at most one token.
            token_group: defaults to `group`.
            checked: the first step of a run is (`Mesh.shard`).

        The rest are attributes of the class.

        Raises:
            ValueError: fewer tokens than processes, bounds that do not ascend from 0 to `length`, a process that is
                not in the group; where checked, on every process if on one.
        """
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup | VirtualGroup | None):
            raise ValueError("this process is not in the sequence group: only the group's members have a shard")
        size, rank = group_size(group), group_rank(group)

        def geometry() -> Geometry:
            offsets = even_bounds(length, size) if bounds is None else tuple(int(b) for b in bounds)
            check_bounds(offsets, length, size)
            return offsets, parse_document_starts(document_starts, length)

        if checked and size > 1 and isinstance(group, dist.ProcessGroup):
            offsets, documents = agreed(group, length, geometry)
        else:
            offsets, documents = geometry()
        return cls(
            bounds=offsets,
            rank=rank,
            group=group if size > 1 else None,
            document_starts=documents,
            token_group=token_group if token_group is not None else group,
            expert_group=expert_group,
            ledger=ledger if ledger is not None else CommunicationLedger(),
            strategies=strategies or Strategies(),
            link=Link.for_backend(dist.get_backend(group)) if isinstance(group, dist.ProcessGroup) else Link(),
            node_size=node_size,
            checked=checked,
        )

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.bounds[-1]

    @property
    def size(self) -> int:
        """Number of processes along the sequence."""
        return len(self.bounds) - 1

    @property
    def start(self) -> int:
        """Global position of the first token here."""
        return self.bounds[self.rank]

    @property
    def stop(self) -> int:
        """Global position after the last token here."""
        return self.bounds[self.rank + 1]

    @property
    def local_length(self) -> int:
        """Tokens of this shard."""
        return self.stop - self.start

    def length_of(self, rank: int) -> int:
        """Tokens of another process's shard."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def labelled(self, layer: str) -> SequenceShard:
        """The same shard, whose motions are counted under `layer`."""
        return replace(self, layer=layer)

    def start_mask(self, device: torch.device | str | None = None) -> Tensor | None:
        """(B or 1, T) bool, True where a document begins after position 0; None where none does in any row.

        None depends only on values known to every process, so that all processes take the same branches.
        """
        return self.start_mask_of(self.start, self.stop, device)

    def whole_start_mask(self, device: torch.device | str | None = None) -> Tensor | None:
        """(B or 1, L): `start_mask` of the whole sequence."""
        return self.start_mask_of(0, self.length, device)

    def start_mask_of(self, first: int, last: int, device: torch.device | str | None = None) -> Tensor | None:
        """(B or 1, last - first): `start_mask` of the global positions [first, last), outside the sequence too."""
        if self.document_starts is None:
            return None
        return _documents_on(self.document_starts, first, last, torch.device(device or "cpu"))[0]

    def document_begin(self, device: torch.device | str | None = None) -> Tensor:
        """(B or 1, T) int64: the global position at which each token's document begins."""
        return _documents_on(self.document_starts, self.start, self.stop, torch.device(device or "cpu"))[1]

    def whole_document_begin(self) -> Tensor:
        """(B or 1, L) int64: `document_begin` of the whole sequence."""
        return _documents_on(self.document_starts, 0, self.length, torch.device("cpu"))[1]

    def reset_mask(self, device: torch.device | str | None = None) -> Tensor | None:
        """(B or 1,) bool: a document begins inside this shard, so that no earlier state survives it."""
        mask = self.start_mask(device)
        return None if mask is None else mask.any(dim=1)


# Asked for by every layer, of shards that FSDP copies from layer to layer.
@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _documents_on(
    documents: DocumentStarts | None, start: int, stop: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of tokens [start, stop): `SequenceShard.start_mask` and `SequenceShard.document_begin`."""
    rows = documents if documents is not None else ((),)
    mask = torch.zeros(len(rows), stop - start, dtype=torch.bool)
    begin = torch.empty(len(rows), stop - start, dtype=torch.int64)
    for row, starts in enumerate(rows):
        first, last = bisect.bisect_left(starts, start), bisect.bisect_left(starts, stop)
        here = torch.tensor(starts[first:last], dtype=torch.int64)
        mask[row, here - start] = True
        edges = torch.tensor([start, *starts[first:last], stop])
        before = torch.tensor([starts[first - 1] if first else 0])
        begin[row] = torch.cat([before, here]).repeat_interleave(edges.diff())
    return mask.to(device, non_blocking=True), begin.to(device, non_blocking=True)


def even_bounds(length: int, size: int) -> tuple[int, ...]:
    """Offsets of `size` contiguous parts of `length` tokens whose sizes differ by at most one, larger ones first."""
    share, rest = divmod(length, size)
    return tuple(rank * share + min(rank, rest) for rank in range(size + 1))


def parse_document_starts(value: object, length: int) -> DocumentStarts | None:
    """Bring document starts to one form: per row, ascending positions in (0, length).

    Accepts None; positions (sequence of int or 1-D integer tensor) for all rows; one such sequence per row; or a
    boolean mask (L,) or (B, L). Position 0 begins a document anyway and is dropped.

    Raises:
        ValueError: a position outside [0, length), or a mask of another length.
    """
    if value is None:
        return None
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        if value.shape[-1] != length:
            raise ValueError(f"document_starts is a mask of {value.shape[-1]} tokens; the sequence has {length}")
        rows = [row.nonzero().flatten().tolist() for row in value.reshape(-1, length)]
    else:
        plain = value.tolist() if isinstance(value, Tensor) else list(value)  # type: ignore[arg-type]
        rows = plain if plain and isinstance(plain[0], (list, tuple)) else [plain]
    parsed = tuple(tuple(sorted({int(p) for p in row} - {0})) for row in rows)
    for row in parsed:
        outside = [p for p in row if not 0 <= p < length]
        if outside:
            raise ValueError(f"document start {outside[0]} lies outside the sequence of {length} tokens")
    return parsed if any(parsed) else None


def check_bounds(bounds: tuple[int, ...], length: int, size: int) -> None:
    """ValueError unless these are offsets of `size` parts, none empty, of `length` tokens."""
    if length < size:
        raise ValueError(f"a sequence of {length} tokens cannot be split over {size} processes: use at most {length}")
    ascending = all(a < b for a, b in itertools.pairwise(bounds))
    if len(bounds) != size + 1 or bounds[0] != 0 or bounds[-1] != length or not ascending:
        raise ValueError(f"bounds {bounds} must be {size + 1} ascending offsets from 0 to {length}, no part empty")
