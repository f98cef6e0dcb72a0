"""What must agree before a message can be sent: compared in a small collective, with the same error on every process.

Without it a mistake of one process ends in a hang or in garbage on the others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Group

DocumentStarts = tuple[tuple[int, ...], ...]
Geometry = tuple[tuple[int, ...], DocumentStarts | None]
"""Offsets of the shards, and where documents begin."""


class CommunicationError(RuntimeError):
    """A peer died, hung beyond the process group's timeout, or broke the connection."""


def timeout_of(group: Group | None) -> str:
    """How long a message over the group may take, for people: "30 s"."""
    if not isinstance(group, dist.ProcessGroup):
        return "unknown"
    options = getattr(group._get_backend(_device(group)), "options", None)
    timeout = getattr(options, "_timeout", None)
    return f"{timeout.total_seconds():g} s" if timeout is not None else "unknown"


def agreed(group: dist.ProcessGroup, length: int, make: Callable[[], Geometry]) -> Geometry:
    """What `make` returns, if every process of the group makes the same of the same `length`.

    Raises:
        ValueError: on every process. On those where `make` raises one, that one.
    """
    offsets: tuple[int, ...] = ()
    documents: DocumentStarts | None = None
    refused: ValueError | None = None
    try:
        offsets, documents = make()
    except ValueError as error:
        refused = error
    mine = [int(refused is not None), length, _crc(offsets), _crc(documents)]
    table = _from_everyone(group, mine, "comparing shards")
    if refused is not None:
        raise refused
    for rank, (failed, *found) in enumerate(table):
        if failed:
            raise ValueError(f"rank {rank} of the sequence group cannot make its shard: its own error says why")
        if found[0] != table[0][1]:
            raise ValueError(f"rank 0 has sequences of {table[0][1]} tokens, rank {rank} of {found[0]}: {_REMEDY}")
        for what, ours, first in zip(("bounds", "document starts"), found[1:], table[0][2:], strict=True):
            if ours != first:
                raise ValueError(f"rank {rank} has other {what} than rank 0: {_REMEDY}")
    return offsets, documents


_REMEDY = "give every rank the same length, bounds, documents and dtype"


def verify_exchange(
    group: dist.ProcessGroup, dtype: torch.dtype, send_sizes: list[int], receive_sizes: list[int], motion: str
) -> None:
    """Compare what every process is about to send with what its peers expect.

    Raises:
        ValueError: the same one on every process, naming the first pair that disagrees.
    """
    size = dist.get_world_size(group)
    mine = [zlib.crc32(motion.encode()), _DTYPES.index(dtype), *send_sizes, *receive_sizes]
    table = _from_everyone(group, mine, motion)
    for sender in range(size):
        for receiver in range(size):
            sent, expected = table[sender][2 + receiver], table[receiver][2 + size + sender]
            kinds = _DTYPES[table[sender][1]], _DTYPES[table[receiver][1]]
            if table[sender][0] != table[receiver][0]:
                raise ValueError(f"{motion}: rank {sender} and rank {receiver} are in different motions")
            if sent != expected or kinds[0] != kinds[1]:
                raise ValueError(
                    f"{motion}: rank {sender} sends {sent} numbers of {kinds[0]} to rank {receiver}, which expects "
                    f"{expected} of {kinds[1]}: {_REMEDY}"
                )


def _from_everyone(group: dist.ProcessGroup, numbers: Sequence[int], motion: str) -> list[list[int]]:
    mine = torch.tensor(numbers, device=_device(group))
    rows: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(rows, mine, group=group)
    except RuntimeError as error:
        raise CommunicationError(
            f"{motion}: rank {dist.get_rank(group)} of {len(rows)} lost its peers (a message may take "
            f"{timeout_of(group)}): {str(error).splitlines()[0]}"
        ) from error
    return [row.tolist() for row in rows]


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _crc(value: object) -> int:
    return zlib.crc32(repr(value).encode())


_DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
