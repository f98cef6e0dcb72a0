"""Models into checkpoints: one parameter is gathered at a time, and one tensor written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..language_model import LanguageModel
from .checkpoint import FILE_BYTES, CheckpointWriter, refuse_occupied
from .files import InterchangeError
from .layout import tensor_map, write_config
from .layouts import LAYOUTS, alternatives
from .mapping import TensorMap


def save_pretrained(
    model: LanguageModel,
    directory: str | Path,
    *,
    layout: str,
    dtype: torch.dtype | None = None,
    token_ids: Mapping[str, int | None] | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write a checkpoint that the layout's own software reads.

    A sharded model is gathered one parameter at a time: all processes call this, and the first one writes.

    Args:
        directory: made if need be; it must not hold a checkpoint.
        layout: a name in `LAYOUTS`.
        dtype: of the stored tensors; the parameters' when not given.
        token_ids: of special tokens (eos_token_id), for config.json where that is transformers', which otherwise takes
            ids of its own for them.
        file_bytes: the longest file; there are several, with an index, if the model does not fit in one.

    Raises:
        InterchangeError: no such layout, a model that is not of its kind, or a directory that cannot be written; on
            every process.
    """
    if layout not in LAYOUTS:
        raise InterchangeError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    dtype = dtype or model.embedding.weight.dtype
    try:
        values = write_config(LAYOUTS[layout], model.config)
    except InterchangeError as error:
        raise InterchangeError(f"{error}; {alternatives(model.config, layout)}") from None
    values["dtype"] = str(dtype).removeprefix("torch.")
    values |= token_ids or {} if "architectures" in values else {}
    tensors = tensor_map(LAYOUTS[layout], model.config)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    writes = not sharded or dist.get_rank() == 0

    def write() -> None:
        writer = CheckpointWriter(directory, tensors.shapes, dtype, file_bytes)
        try:
            for key, tensor in stream:
                writer.write(key, tensor)
            writer.finish(values)
        finally:
            writer.close()

    _agree(_failure(directory, lambda: refuse_occupied(Path(directory))) if writes else None, sharded)
    stream = stored_tensors(model, tensors, dtype, writes)
    failure = _failure(directory, write) if writes else None
    for _ in stream:
        pass  # every process takes part in gathering to the end, also where writing has failed
    _agree(failure, sharded)


def stored_tensors(
    model: LanguageModel, tensors: TensorMap, dtype: torch.dtype, wanted: bool
) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor in order, on the CPU; empty ones where they are not `wanted` and only gathered for others."""
    parameters = dict(model.named_parameters())
    name, full = "", torch.empty(0)
    for key, pieces in tensors.of_key().items():
        stored = torch.empty(tensors.shapes[key] if wanted else 0, dtype=dtype)
        for piece in pieces:
            if piece.parameter != name:
                name, full = piece.parameter, _whole(parameters[piece.parameter])
            if wanted:
                part = full[piece.box]
                if piece.conversion is not None:
                    part = piece.conversion.store(part.cpu().double(), piece.box)
                stored[piece.stored].copy_(piece.aligned(part))
        yield key, stored


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _failure(directory: str | Path, work: Callable[[], None]) -> str | None:
    """Do the work; why it failed, in one line, if a user can mend it."""
    try:
        work()
    except InterchangeError as error:
        return str(error)
    except OSError as error:
        return f"{directory} cannot be written: {error.strerror or error}"
    return None


def _agree(failure: str | None, sharded: bool) -> None:
    """Raise the first process's failure on all."""
    if sharded:
        outcome = [failure]
        dist.broadcast_object_list(outcome, src=0)
        (failure,) = outcome
    if failure is not None:
        raise InterchangeError(failure)
