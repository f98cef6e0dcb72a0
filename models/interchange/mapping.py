"""Where each parameter of a model lies in the tensors of a stored checkpoint, and the other way round.

Formats differ in names, in what they fuse (gate and up, queries and keys and values, experts), in the order of rows
and in the order of dimensions; hardly ever in the numbers. So a parameter is cut into boxes, each of which is a box of
a stored tensor with its dimensions in another order. Boxes can be cut further, to what one process holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .files import Region, whole

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """Numbers that are stored otherwise than they are trained.

    Attributes:
        load, store: (values, their box in the parameter) -> values, from and to the stored tensor, in float64.
        limits: what the stored values must be for the parameter to be finite.
    """

    load: Callable[[Tensor, Region], Tensor]
    store: Callable[[Tensor, Region], Tensor]
    limits: str


@dataclass(frozen=True)
class Piece:
    """A box of a parameter that is a box of a stored tensor.

    Attributes:
        box: in the parameter; every step is 1.
        stored: in the stored tensor; steps may be larger, where streams are interleaved.
        axes: for each dimension of the stored tensor the parameter's; None where the parameter has none and the stored
            size is 1. A dimension of the parameter that is not named has size 1 in the box.
    """

    parameter: str
    key: str
    box: Region
    stored: Region
    axes: tuple[int | None, ...]
    conversion: Conversion | None = None

    def aligned(self, part: Tensor) -> Tensor:
        """A view of a part of the box with the stored tensor's dimensions."""
        named = [axis for axis in self.axes if axis is not None]
        others = [axis for axis in range(part.dim()) if axis not in named]
        part = part.permute(*named, *others).flatten(len(named)).squeeze(-1) if others else part.permute(*named)
        for position, axis in enumerate(self.axes):
            if axis is None:
                part = part.unsqueeze(position)
        return part

    def within(self, region: Region) -> tuple[Region, Region] | None:
        """What of this piece lies in a box of the parameter: (relative to that box, in the stored tensor), or None."""
        inside = [
            slice(max(mine.start, theirs.start), min(mine.stop, theirs.stop))
            for mine, theirs in zip(self.box, region, strict=True)
        ]
        if any(cut.start >= cut.stop for cut in inside):
            return None
        relative = tuple(
            slice(cut.start - theirs.start, cut.stop - theirs.start) for cut, theirs in zip(inside, region, strict=True)
        )
        stored = list(self.stored)
        for position, axis in enumerate(self.axes):
            if axis is not None:
                step, offset = self.stored[position].step, self.stored[position].start
                first, last = inside[axis].start - self.box[axis].start, inside[axis].stop - 1 - self.box[axis].start
                stored[position] = slice(offset + first * step, offset + last * step + 1, step)
        return relative, tuple(stored)


@dataclass
class TensorMap:
    """The pieces of every parameter of a model, and with them the shapes of the stored tensors.

    Attributes:
        parameters: shapes of the model's parameters.
        shapes: shapes of the stored tensors, in the order in which they are written.
        copies: stored tensors that repeat another, which may be absent or, if there, must be equal to it.
        ignored: endings of keys that may be there and say nothing that the config does not.
    """

    parameters: Mapping[str, Shape]
    shapes: dict[str, Shape] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def add(
        self,
        parameter: str,
        key: str,
        *,
        rows: slice | None = None,
        stored: Region | None = None,
        shape: Shape | None = None,
        box: Region | None = None,
        axes: tuple[int | None, ...] | None = None,
        conversion: Conversion | None = None,
    ) -> None:
        """`parameter`, or rows or a box of it, is stored as `key`.

        Args:
            axes: of the stored tensor, see `Piece`; the same dimensions when not given.
            stored, shape: the box in the stored tensor and its whole shape; when not given, the stored tensor is
                just the box.
        """
        box = box or whole(self.parameters[parameter])
        if rows is not None:
            box = (slice(rows.start, rows.stop, 1), *box[1:])
        axes = axes if axes is not None else tuple(range(len(box)))
        lengths = tuple(1 if axis is None else box[axis].stop - box[axis].start for axis in axes)
        self.shapes[key] = shape or lengths
        self.pieces.append(Piece(parameter, key, box, stored or whole(lengths), axes, conversion))

    def split(self, parameter: str, keys: Sequence[str], sizes: Sequence[int] | None = None) -> None:
        """The rows of `parameter` are stored as several tensors, of equal heights when `sizes` are not given."""
        sizes = sizes or [self.parameters[parameter][0] // len(keys)] * len(keys)
        start = 0
        for key, size in zip(keys, sizes, strict=True):
            self.add(parameter, key, rows=slice(start, start + size))
            start += size

    def join(self, parameters: Sequence[str], key: str) -> None:
        """Several parameters, one above the other, are stored as one tensor."""
        heights = [self.parameters[parameter][0] for parameter in parameters]
        shape = (sum(heights), *self.parameters[parameters[0]][1:])
        start = 0
        for parameter, height in zip(parameters, heights, strict=True):
            stored = (slice(start, start + height, 1), *whole(shape[1:]))
            self.add(parameter, key, stored=stored, shape=shape)
            start += height

    def of_parameter(self) -> dict[str, list[Piece]]:
        return _grouped((piece.parameter, piece) for piece in self.pieces)

    def of_key(self) -> dict[str, list[Piece]]:
        return _grouped((piece.key, piece) for piece in self.pieces)

    def check(self) -> None:
        """Assert that every element of every parameter and of every stored tensor is in one piece."""
        for pieces, shapes in ((self.of_parameter(), self.parameters), (self.of_key(), self.shapes)):
            assert pieces.keys() == shapes.keys(), pieces.keys() ^ shapes.keys()
            for name, own in pieces.items():
                covered = sum(math.prod(cut.stop - cut.start for cut in piece.box) for piece in own)
                assert covered == math.prod(shapes[name]), name


def _grouped(pairs: Iterable[tuple[str, Piece]]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for name, piece in pairs:
        groups.setdefault(name, []).append(piece)
    return groups


def local_region(parameter: Tensor) -> Region:
    """Which box of a parameter this process holds: all of a plain tensor, a part of a distributed one.

    The box may be empty. Sharding follows torch.chunk, one mesh axis after the other.
    """
    region = list(whole(parameter.shape))
    if isinstance(parameter, DTensor):
        for mesh_dim, placement in enumerate(parameter.placements):
            if type(placement) is Shard:
                held = region[placement.dim]
                height = -(-(held.stop - held.start) // parameter.device_mesh.size(mesh_dim))
                first = held.start + height * parameter.device_mesh.get_local_rank(mesh_dim)
                start = min(first, held.stop)
                region[placement.dim] = slice(start, min(first + height, held.stop), 1)
            elif type(placement) is not Replicate:
                raise TypeError(f"a parameter is placed as {placement}; known are Shard and Replicate")
        assert tuple(cut.stop - cut.start for cut in region) == tuple(parameter.to_local().shape)
    return tuple(region)
