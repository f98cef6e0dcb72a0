"""Checkpoints into models: each process reads the boxes of the tensors that it holds, a buffer at a time."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ...parallel import local_part
from ..language_model import LanguageModel
from .checkpoint import CheckpointReader
from .files import BUFFER_BYTES, InterchangeError, Region
from .layout import Layout, differences, listed, tensor_map
from .layouts import identify
from .mapping import Piece, Shape, TensorMap, local_region


def load_pretrained(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LanguageModel:
    """The model that a checkpoint holds, whole on one device.

    Args:
        directory: config.json and safetensors files, in any of `LAYOUTS`.
        dtype: of the parameters; by default the widest of the stored tensors, so that nothing is rounded.

    Raises:
        InterchangeError: see `load_into`.
    """
    with CheckpointReader(directory) as reader:
        layout, config = identify(reader.config, directory)
        with torch.device("meta"):
            model = LanguageModel(config)
        tensors = checked_map(model, layout, reader)
        model = model.to(dtype or _widest(reader)).to_empty(device=device)
        fill(model, tensors, reader)
    return model


def load_into(model: LanguageModel, directory: str | Path) -> None:
    """Overwrite the parameters of a model, which may be sharded; every process reads what it holds and little more.

    Nothing of the size of the checkpoint, or of a whole parameter, is ever in memory. No process group takes part:
    every process must be able to read the directory.

    Raises:
        InterchangeError: no checkpoint, one in pickle files, an unknown layout or option, another model; or tensors
            that are missing, unknown or of another shape, all of them in one line. The model is then as it was. Or
            numbers that the model's parameters cannot express.
    """
    with CheckpointReader(directory) as reader:
        layout, config = identify(reader.config, directory)
        if found := differences(model.config, config):
            raise InterchangeError(f"{directory} holds another model: {listed(found)}")
        fill(model, checked_map(model, layout, reader), reader)


def checked_map(model: LanguageModel, layout: Layout, reader: CheckpointReader) -> TensorMap:
    """Where the parameters are. InterchangeError, with all that is wrong, if the checkpoint is not as it should be."""
    tensors = tensor_map(layout, model.config)
    reader.complete(layout.prefix)
    stored = {key: entry.shape for key, entry in reader.entries.items() if not key.endswith(tensors.ignored or "\0")}
    expected = tensors.shapes
    copies = {key: expected[original] for key, original in tensors.copies.items() if key in stored}
    problems = _listed("missing", [key for key in expected if key not in stored])
    problems += _listed("unknown", [key for key in stored if key not in expected and key not in copies])
    problems += _listed("misshapen", _misshapen(stored, {**expected, **copies}))
    if not problems:
        unequal = [key for key in copies if not equal(reader, key, tensors.copies[key])]
        problems = _listed("different from what it is tied to", unequal)
    if problems:
        raise InterchangeError(f"{reader.directory} does not fit its config as {layout.name}: {'; '.join(problems)}")
    return tensors


def fill(model: LanguageModel, tensors: TensorMap, reader: CheckpointReader) -> None:
    """Copy what this process holds of every parameter."""
    pieces = tensors.of_parameter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            region, local = local_region(parameter), local_part(parameter)
            for piece in pieces[name]:
                overlap = piece.within(region)
                if overlap is not None:
                    held, stored = overlap
                    if piece.conversion is None:
                        reader.read_into(piece.key, stored, piece.aligned(local[held]))
                    else:
                        local[held].copy_(_converted(reader, piece, region, held, stored))


def _converted(reader: CheckpointReader, piece: Piece, region: Region, held: Region, stored: Region) -> Tensor:
    conversion = piece.conversion
    assert conversion is not None
    values = torch.empty([cut.stop - cut.start for cut in held], dtype=torch.float64)
    reader.read_into(piece.key, stored, piece.aligned(values))
    box = tuple(slice(cut.start + own.start, cut.stop + own.start) for cut, own in zip(held, region, strict=True))
    values = conversion.load(values, box)
    if not values.isfinite().all():
        raise InterchangeError(f"{reader.directory}: {piece.key} must be {conversion.limits} to be trained here")
    return values


def equal(reader: CheckpointReader, key: str, other: str) -> bool:
    """Whether two stored matrices are the same, in whole or in parts that fit a buffer."""
    rows, columns = reader.entries[key].shape
    at_once = max(1, BUFFER_BYTES // (8 * columns))
    for first in range(0, rows, at_once):
        region = (slice(first, min(first + at_once, rows), 1), slice(0, columns, 1))
        ours, theirs = (torch.empty(region[0].stop - first, columns, dtype=torch.float64) for _ in range(2))
        reader.read_into(key, region, ours)
        reader.read_into(other, region, theirs)
        if not torch.equal(ours, theirs):
            return False
    return True


def _misshapen(stored: dict[str, Shape], expected: dict[str, Shape]) -> list[str]:
    return [
        f"{key} {stored[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in stored and stored[key] != shape
    ]


def _listed(what: str, names: list[str]) -> list[str]:
    return [f"{what}: {', '.join(names)}"] if names else []


def _widest(reader: CheckpointReader) -> torch.dtype:
    dtypes = {entry.dtype for entry in reader.entries.values() if entry.dtype.is_floating_point}
    return reduce(torch.promote_types, dtypes)
