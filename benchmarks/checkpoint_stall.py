"""How long training stands still for a checkpoint: written while it waits, and written beside it.

    python -m benchmarks.checkpoint_stall [--workers 2] [--width 384]

One run saves its state (parameters and both moments) several times in each way, in turn. The stall of a checkpoint
beside training is what `save` takes before it returns, the copy to host memory; what it costs the steps that follow,
while a thread writes, is printed too. The first save beside training, which also takes the memory, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from longstride.parallel import Mesh
from longstride.workers import Experiment, Trainer, create_run
from longstride.workers.configuration import validate
from longstride.workers.run_directory import RunDirectory

from .measuring import machine
from .processes import on_processes

Times = dict[str, list[float]]


def stalls(rank: int, world_size: int, directory: str, width: int, repeats: int) -> tuple[float, Times]:
    """Mebibytes of state per process, and seconds of steps and saves by kind."""
    tree = {
        "workers": world_size,
        "run": {"directory": directory, "name": "stall"},
        "model": {"vocab_size": 256, "width": width, "layers": "[mamba, attention] x 2", "attention": {"heads": 8}},
        "data": {"context": 128, "batch": world_size},
        "parallel": {"data": world_size},
        "checkpoint": {"keep": 1},
        "tracking": {"enabled": False},
    }
    experiment = validate(Experiment, tree)
    if rank == 0:
        create_run(experiment)
    mesh = Mesh(data=world_size)
    trainer = Trainer(experiment, mesh, RunDirectory(f"{directory}/stall"))
    found: Times = {"step": [], "synchronous": [], "asynchronous": [], "step beside writing": []}
    trainer.step()
    trainer.save(wait=False)
    for _ in range(repeats):
        found["step"].append(_seconds(trainer.step))
        trainer.checkpointer.wait()
        found["synchronous"].append(_seconds(lambda: trainer.save(wait=True)))
        found["asynchronous"].append(_seconds(lambda: trainer.save(wait=False)))
        found["step beside writing"].append(_seconds(trainer.step))
        trainer.checkpointer.wait()
    trainer.loader.close()
    size = sum(tensor.numel() * tensor.element_size() for tensor in trainer.checkpointer._staged.values())
    return size / world_size / 2**20, found


def _seconds(work: object) -> float:
    began = time.perf_counter()
    assert callable(work)
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (str(Path(directory)), chosen.width, chosen.repeats)
        size, found = on_processes(stalls, chosen.workers, *arguments)
    where = machine(1)
    print(f"{where['processor']}, {where['cores']} cores, load {where['load_average']:.1f}, {where['date']}")
    print(f"{chosen.workers} processes, {size:.0f} MiB of state each; median of {chosen.repeats}")
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, seconds in medians.items():
        print(f"{name:<22}{1e3 * seconds:>10.1f} ms")
    print(f"stall beside training / synchronous: {medians['asynchronous'] / medians['synchronous']:.1%}")


if __name__ == "__main__":
    main()
