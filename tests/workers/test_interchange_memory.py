"""An import into a sharded run: each process has its share of the weights in memory and a buffer, never all of them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil
import torch.distributed as dist

from longstride.models import build_model
from longstride.models.interchange import save_pretrained
from longstride.workers.interchange import import_run, imported_experiment

from ..distributed import run_ranks
from ..orchestrator.nodes import free_port

LLAMA = {"vocab_size": 256, "width": 1024, "layers": "[attention] x 4", "mlp": {"hidden": 4096}}
MARGIN = 48 << 20
"""The reader's buffer of 32 MiB, and what the libraries take for a process group and a checkpoint."""
OVERRIDES = ["data.context=64", "data.batch=1", "parallel.sequence=auto", "tracking.enabled=false"]


def growth(rank: int, world_size: int, there: Path, out: Path, port: int) -> int:
    """Bytes by which the peak of this process, new until then, lies over what it had before the import."""
    experiment = imported_experiment(str(there), str(out), [*OVERRIDES, f"workers={world_size}"])
    dist.destroy_process_group()  # the import makes the run's own
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    before = psutil.Process().memory_info().rss
    import_run(str(there), experiment, rank, threads=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def test_no_process_of_several_holds_the_model(tmp_path: Path) -> None:
    model = build_model(LLAMA)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    save_pretrained(model, tmp_path / "there", layout="llama", file_bytes=64 << 20)
    assert size > 256 << 20 and len(list((tmp_path / "there").glob("*.safetensors"))) > 3
    alone, *_ = run_ranks(growth, 1, tmp_path / "there", tmp_path / "alone", free_port("127.0.0.1"))
    assert alone > 0.95 * size, "the measure sees a whole model"
    for grown in run_ranks(growth, 4, tmp_path / "there", tmp_path / "shared", free_port("127.0.0.1")):
        assert size / 4 < grown < size / 4 + MARGIN < size / 2
