"""Checkpoints into and out of models whose parameters are sharded and whose experts are spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longstride.models import LanguageModel, ModelConfig, build_model
from longstride.models.interchange import (
    InterchangeError,
    files,
    load_config,
    load_into,
    load_pretrained,
    save_pretrained,
)
from longstride.models.interchange.checkpoint import CheckpointReader
from longstride.models.interchange.layouts import identify
from longstride.models.interchange.loading import checked_map, fill
from longstride.parallel import Mesh, local_part, shard_model
from tests.distributed import run_ranks

from .cases import numbers

CONFIGS: dict[str, dict[str, Any]] = {
    "jamba": {
        "vocab_size": 50,
        "width": 16,
        "layers": "[mamba+mlp, attention+moe, mamba+mlp, mamba+moe]",
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "mamba": {"inner_norms": True},
        "attention": {"heads": 4, "kv_heads": 2, "rotary_base": None},
        "mlp": {"hidden": 24},
        "moe": {"experts": 4, "hidden": 24, "renormalise": False},
    },
    # three heads of queries and one of keys: rows of a fused tensor that no two processes share evenly
    "striped-hyena-7b": {
        "vocab_size": 50,
        "width": 18,
        "layers": "[modal_hyena, attention] x 2",
        "tie_embeddings": True,
        "modal_hyena": {"heads": 3},
        "attention": {"heads": 3, "kv_heads": 1},
        "mlp": {"hidden": 25},
    },
    # eight groups of the middle operator's filters: rows of the window that three processes divide unevenly
    "evo2": {
        "vocab_size": 50,
        "width": 24,
        "layers": "hyena-se+mlp(kind=geglu), hyena-mr, hyena-li, attention",
        "norm": "rms_outer",
        "norm_eps": 1e-6,
        "mlp": {"kind": "bilinear", "hidden": 32},
        "hyena_se": {"groups": 6},
        "hyena_mr": {"groups": 8},
        "attention": {"heads": 4, "bias": "out"},
    },
    "mixtral": {
        "vocab_size": 50,
        "width": 16,
        "layers": "[attention] x 2",
        "feed_forward": "moe",
        "tie_embeddings": False,
        "attention": {"heads": 4, "kv_heads": 2},
        "moe": {"experts": 4, "hidden": 24},
    },
}
TRANSFORMED = ("blocks.1.filter.h", "blocks.2.filter.log_poles")
"""Evo 2's stored tensors that are trained in other terms: over their window, and as logarithms of rates."""
DEGREES = [
    ("jamba", {"sequence": 2}),
    ("jamba", {"data": 2, "expert": 2}),
    ("jamba", {"data": 2, "sequence": 2, "expert": 2}),
    ("jamba", {"replicate": 2}),
    ("striped-hyena-7b", {"sequence": 3}),
    ("evo2", {"sequence": 3}),
    ("mixtral", {"data": 2, "expert": 2}),
]


def processes(degrees: dict[str, int]) -> int:
    return degrees.get("replicate", 1) * degrees.get("data", 1) * degrees.get("sequence", 1)


def sharded_model(config: ModelConfig, degrees: dict[str, int]) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(config)
    shard_model(model, Mesh(**degrees), blocks=list(model.blocks), experts=model.expert_modules())
    return model.to_empty(device="cpu")


def there_and_back(rank: int, world_size: int, directory: Path, layout: str, degrees: dict[str, int]) -> dict[str, Any]:
    model = sharded_model(load_config(directory), degrees)
    load_into(model, directory)
    save_pretrained(model, directory / "out", layout=layout, file_bytes=20_000)
    with CheckpointReader(directory) as reader:
        fill(model, checked_map(model, identify(reader.config, directory)[0], reader), reader)
        read = reader.bytes_read
    held = sum(local_part(parameter).numel() for parameter in model.parameters())
    whole: dict[str, Tensor] = {name: p.detach().full_tensor() for name, p in model.named_parameters()}  # type: ignore[operator]
    return {"whole": whole, "read": read, "held": 4 * held}


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("layout", "degrees"), DEGREES)
def test_sharded_there_and_back(layout: str, degrees: dict[str, int], tmp_path: Path) -> None:
    model = build_model(CONFIGS[layout])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * numbers(name, *parameter.shape).float()
    save_pretrained(model, tmp_path / "in", layout=layout)
    if layout == "evo2":
        model = load_pretrained(tmp_path / "in")  # the windowed filters are bitwise what one process reads
    for rank in run_ranks(there_and_back, processes(degrees), tmp_path / "in", layout, degrees):
        for name, parameter in model.named_parameters():
            assert torch.equal(rank["whole"][name], parameter), name
        assert rank["held"] <= rank["read"]
        # whole rows are read: what is sharded in its second stored dimension (experts) is read by all who share it
        # and evo2's short filters, stored the other way round, a tap at a time, each time with its row
        if layout != "evo2" and ("expert" not in degrees or processes(degrees) == degrees["expert"]):
            assert rank["read"] == rank["held"]
    before, after = stored(tmp_path / "in"), stored(tmp_path / "in" / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if layout == "evo2" and name in TRANSFORMED:
            assert torch.allclose(after[name], tensor, rtol=4 * torch.finfo(tensor.dtype).eps, atol=1e-36), name
        else:
            assert torch.equal(after[name], tensor), name
    assert load_config(tmp_path / "in" / "out") == load_config(tmp_path / "in")
    assert len(list((tmp_path / "in" / "out").glob("*.safetensors"))) > 1


def failing_save(rank: int, world_size: int, directory: Path, full_disk: bool) -> str:
    model = sharded_model(load_config(directory), {"sequence": 2})
    if full_disk:
        written: list[str] = []

        def write(self: files.SafetensorsWriter, key: str, tensor: Tensor) -> None:
            written.append(key)
            if len(written) > 3:
                raise OSError(28, "No space left on device")

        files.SafetensorsWriter.write = write  # type: ignore[method-assign]  (this process ends after the test)
    try:
        save_pretrained(model, directory / "new" if full_disk else directory, layout="jamba")
    except InterchangeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("full_disk", [False, True])
def test_a_failed_save_fails_on_every_process(full_disk: bool, tmp_path: Path) -> None:
    """Before anything is gathered, and in the middle: no process is left waiting for the others."""
    save_pretrained(build_model(CONFIGS["jamba"]), tmp_path, layout="jamba")
    errors = run_ranks(failing_save, 2, tmp_path, full_disk)
    full, occupied = "new cannot be written: No space left on device", " holds a checkpoint already; give another"
    assert errors[0] == errors[1]
    assert (full if full_disk else occupied) in errors[0]
    assert not (tmp_path / "new" / "config.json").exists()
