"""Where a split pass spends what two processes apart do not: PyTorch's profiler on both, operation by operation.

    OMP_NUM_THREADS=1 python -m benchmarks.split_profile [--only mamba-2,hyena,experts] [--save benchmarks/results]

Two processes run the forward and backward pass of a layer (those of `benchmarks.scaling`) split over them, and then
apart, each on a sequence of half the length without a word to the other. The difference is what splitting costs: the
messages, the waiting, and work that one process would not have. Milliseconds are rank 0's own time in an operation,
medians of the repeats; a line for each of the operations that differ most. Before them the processor time of a pass,
measured without the profiler: it leaves out the waiting, and varies less beside other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from longstride.parallel import SequenceShard

from .measuring import RESULTS
from .processes import on_processes
from .scaling import LAYERS, make_model, run, split_shard

Times = dict[str, float]
PROCESSOR = "processor time"


def operations(once: Callable[[], object], repeats: int) -> Times:
    """Milliseconds of each operation itself, medians over the repeats, and their sum under ''."""
    once()
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            once()
        events = profiler.key_averages()
        for event in events:
            found[event.key].append(event.self_cpu_time_total / 1e3)
        found[""].append(sum(event.self_cpu_time_total for event in events) / 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def processor_times(passes: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Milliseconds of processor time of each pass, taken in turns, medians."""
    found: list[list[float]] = [[] for _ in passes]
    for _ in range(repeats):
        for times, once in zip(found, passes, strict=True):
            dist.barrier()
            begun = time.process_time()
            once()
            times.append(1e3 * (time.process_time() - begun))
    return [statistics.median(times) for times in found]


def compare(rank: int, world: int, name: str, length: int, width: int, repeats: int) -> tuple[Times, Times]:
    """Of the layer split over the processes, and apart."""
    layer = LAYERS[name]
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
    split, half = split_shard(layer, length), SequenceShard.whole(length // world)
    model, whole_model = make_model(layer, length, width, rank, world), make_model(layer, length, width, 0, 1)
    passes = (
        lambda: run(layer, model, x, split),
        lambda: run(layer, whole_model, x[:, : length // world], half),
    )
    together, apart = (operations(once, repeats) for once in passes)
    together[PROCESSOR], apart[PROCESSOR] = processor_times(passes, 3 * repeats)
    return together, apart


def table(name: str, split: Times, apart: Times, lines: int) -> list[str]:
    by_difference = sorted({*split, *apart} - {"", PROCESSOR}, key=lambda op: apart.get(op, 0.0) - split.get(op, 0.0))
    rows = [f"| {name} | split, ms | apart, ms | more |", "|---|---|---|---|"]
    for operation in [PROCESSOR, "", *by_difference[:lines]]:
        both = split.get(operation, 0.0), apart.get(operation, 0.0)
        rows.append(f"| {operation or 'in all'} | {both[0]:.1f} | {both[1]:.1f} | {both[0] - both[1]:+.1f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="mamba-2,hyena,experts", help="comma-separated beginnings of layer names")
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lines", type=int, default=8, help="operations in each table")
    parser.add_argument("--save", type=Path, default=RESULTS, help="folder for split_profile.md")
    options = parser.parse_args()
    text = []
    for name in [name for name in LAYERS if any(name.startswith(only) for only in options.only.split(","))]:
        length = min(options.length, LAYERS[name].longest)
        split, apart = on_processes(compare, 2, name, length, options.width, options.repeats)
        text += [*table(name, split, apart, options.lines), ""]
        print("\n".join(text[-options.lines - 5 :]), flush=True)
    options.save.mkdir(parents=True, exist_ok=True)
    (options.save / "split_profile.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
