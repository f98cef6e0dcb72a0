"""A checkpoint's directory: config.json beside one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .files import Entry, InterchangeError, Region, SafetensorsReader, SafetensorsWriter

CONFIG_FILE = "config.json"
ONE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FILE_BYTES = 5 * 10**9
"""Written files are at most this long, but for single tensors that are longer."""


class CheckpointReader:
    """An open checkpoint. `config`: config.json; `entries`: every tensor of every file.

    Raises:
        InterchangeError: no directory, no safetensors in it, or files that do not belong together.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.files: dict[Path, SafetensorsReader] = {}
        self.places: dict[str, SafetensorsReader] = {}
        try:
            for path in _tensor_files(self.directory):
                reader = self.files[path] = SafetensorsReader(path)
                for key in reader.entries:
                    if key in self.places:
                        raise InterchangeError(f"{directory} holds {key} twice, in {path.name} and another file")
                    self.places[key] = reader
        except InterchangeError:
            self.close()
            raise
        self.prefix = ""

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for reader in self.files.values():
            reader.close()

    @property
    def entries(self) -> dict[str, Entry]:
        """By complete key."""
        return {self.prefix + key: reader.entries[key] for key, reader in self.places.items()}

    def complete(self, prefix: str) -> None:
        """Put `prefix` before every key, if none has it."""
        self.prefix = "" if any(key.startswith(prefix) for key in self.places) else prefix

    def read_into(self, key: str, region: Region, target: Tensor) -> None:
        """See `SafetensorsReader.read_into`."""
        key = key.removeprefix(self.prefix)
        self.places[key].read_into(key, region, target)

    @property
    def bytes_read(self) -> int:
        """Of tensors, so far."""
        return sum(reader.bytes_read for reader in self.files.values())

    @property
    def largest_read(self) -> int:
        """The most bytes that were in memory at one time."""
        return max((reader.largest_read for reader in self.files.values()), default=0)


class CheckpointWriter:
    """A new checkpoint: tensors are written one by one in the order of `shapes`; config.json makes it one, last.

    Raises:
        InterchangeError: the directory holds a checkpoint already, or cannot be written.
    """

    def __init__(
        self, directory: str | Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, file_bytes: int
    ) -> None:
        self.directory = Path(directory)
        self.files = _spread({key: Entry(dtype, shape) for key, shape in shapes.items()}, file_bytes)
        self.place = {key: name for name, entries in self.files.items() for key in entries}
        self.open: tuple[str, SafetensorsWriter] | None = None
        refuse_occupied(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, tensor: Tensor) -> None:
        """The next tensor, on the CPU."""
        name = self.place[key]
        if self.open is None or self.open[0] != name:
            self.close()
            self.open = name, SafetensorsWriter(self.directory / name, self.files[name])
        self.open[1].write(key, tensor)

    def finish(self, config: Mapping[str, Any]) -> None:
        """The index, where there are several files, and config.json."""
        self.close()
        if len(self.files) > 1:
            size = sum(entry.num_bytes for entries in self.files.values() for entry in entries.values())
            index = {"metadata": {"total_size": size}, "weight_map": self.place}
            (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (self.directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        if self.open is not None:
            self.open[1].close()
            self.open = None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is. InterchangeError: there is none, or it is not JSON."""
    path = directory / CONFIG_FILE
    if directory.is_file():
        refuse_pickles(directory.parent, [directory])
    if not directory.is_dir():
        raise InterchangeError(f"no directory {directory}: give one with {CONFIG_FILE} and safetensors files")
    if not path.is_file():
        refuse_pickles(directory)
        raise InterchangeError(f"{directory} has no {CONFIG_FILE}, so it is not known what its tensors are")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_as_float)
    except ValueError as error:
        raise InterchangeError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InterchangeError(f"{path} holds no JSON object")
    return config


def _as_float(value: dict[str, Any]) -> Any:
    """transformers 5 writes infinity as {"__float__": "Infinity"}, which JSON lacks."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def refuse_pickles(directory: Path, files: list[Path] | None = None) -> None:
    """InterchangeError if what is there is in pickle files: reading one can run any code that it contains."""
    found = [path.name for path in files or sorted(directory.iterdir()) if path.suffix in PICKLES]
    if found:
        raise InterchangeError(
            f"{directory} holds pickle files ({', '.join(found)}), which can run code when they are read; "
            "convert them to safetensors first"
        )


def refuse_occupied(directory: Path) -> None:
    """InterchangeError if a checkpoint is there already, or anything that is not a directory."""
    if directory.exists() and not directory.is_dir():
        raise InterchangeError(f"{directory} is a file; give a directory to write to")
    if directory.is_dir() and (any(directory.glob("*.safetensors*")) or (directory / CONFIG_FILE).exists()):
        raise InterchangeError(f"{directory} holds a checkpoint already; give another directory")


def _tensor_files(directory: Path) -> list[Path]:
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise InterchangeError(f"{directory} has {len(indices)} indices: {', '.join(path.name for path in indices)}")
    if indices:
        return _indexed_files(indices[0])
    if (directory / ONE_FILE).is_file():
        return [directory / ONE_FILE]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        refuse_pickles(directory)
        raise InterchangeError(f"{directory} has no safetensors files")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InterchangeError(f"{index} is no index: it needs a weight_map from tensors to files") from None
    if outside:
        raise InterchangeError(f"{index} names {outside[0]!r}, which is not a file beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InterchangeError(f"{index.parent} lacks files that its index names: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _spread(entries: Mapping[str, Entry], file_bytes: int) -> dict[str, dict[str, Entry]]:
    """Which tensors go to which file, in order."""
    groups: list[dict[str, Entry]] = [{}]
    used = 0
    for key, entry in entries.items():
        if groups[-1] and used + entry.num_bytes > file_bytes:
            groups.append({})
            used = 0
        groups[-1][key] = entry
        used += entry.num_bytes
    if len(groups) == 1:
        return {ONE_FILE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, start=1)}
