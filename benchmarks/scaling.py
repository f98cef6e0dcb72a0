"""How training scales with its sequence split, gloo on this machine, one thread per process. One command, some minutes:

    python -m benchmarks.scaling [--parts strong,weak,long] [--only mamba,hyena] [--save benchmarks/results]

strong  Forward and backward pass of a layer over one sequence of 131,072 tokens (softmax attention, whose work grows
        with the square: 16,384) on 1 process and on 2, in turns, medians of the repeats. `apart` is what the machine
        itself allows: both processes work at the same time on sequences of half the length without a word between
        them; beyond its speed-up no splitting can go. `wait` is the mean share of the split pass spent waiting,
        `sent` the bytes of the process that sends most.
weak    4,096 tokens per process on 1 to 8 processes: bytes and seconds waited per process. More processes than cores
        wait for their turn on a core as well.
long    A training step of configs/ecoli-1m.yaml from 16,384 to 1,048,576 bases on 2 processes: see `long_context`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longstride.models import LanguageModel, build_model
from longstride.parallel import SequenceShard, Strategies

from . import long_context
from .measuring import RESULTS, machine
from .processes import on_processes


@dataclass(frozen=True)
class Layer:
    """What is measured: blocks of a model, or the feed-forward layer of its first block alone."""

    layers: str
    goal: float
    strategies: Strategies = field(default_factory=Strategies)
    feed_forward_alone: bool = False
    longest: int = 1 << 30
    work_is_linear: bool = True


LAYERS = {
    "mamba": Layer("[mamba]", 1.9),
    "mamba-2": Layer("[mamba2(state=64, head_dim=32)]", 1.9),
    "hyena, modal": Layer("[hyena_li]", 1.9),
    "hyena, by channels": Layer("[hyena]", 1.8, Strategies(convolution="channels")),
    "hyena, by length": Layer("[hyena]", 1.8, Strategies(convolution="length")),
    "attention, heads": Layer("[attention]", 1.8, Strategies(attention="heads"), longest=16_384, work_is_linear=False),
    "attention, ring": Layer("[attention]", 1.8, Strategies(attention="ring"), longest=16_384, work_is_linear=False),
    "experts": Layer("[mamba+moe]", 1.8, feed_forward_alone=True),
    "hybrid": Layer("[mamba+mlp, hyena+moe, mamba+mlp, mamba+moe]", 1.8),
}
WEAK = ("mamba", "mamba-2", "hyena, modal", "hyena, by channels", "attention, ring", "experts")


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: seconds until the last process was done, mean seconds waited, most bytes sent."""

    seconds: float
    waited: float
    sent: int


def make_model(layer: Layer, length: int, width: int, rank: int, world: int) -> LanguageModel:
    """With this process's share of the experts."""
    model = build_model(
        {
            "vocab_size": 8,
            "width": width,
            "layers": layer.layers,
            "feed_forward": "none",
            "hyena": {"max_length": length},
            "attention": {"heads": 4, "kv_heads": 2},
            "mlp": {"hidden": 2 * width},
            "moe": {"experts": 8, "top_k": 2, "hidden": width},
        }
    )
    for experts in model.expert_modules():
        for name, parameter in list(experts.named_parameters()):
            experts.register_parameter(name, nn.Parameter(parameter.detach().chunk(world)[rank].clone()))
    return model


def run(layer: Layer, model: LanguageModel, x: Tensor, shard: SequenceShard) -> Pass:
    """Every process of the shard's group calls it together."""
    here = x[:, shard.start : shard.stop].clone().requires_grad_()
    model.zero_grad()
    shard.ledger.reset()
    group = shard.group if isinstance(shard.group, dist.ProcessGroup) else None
    if group is not None:
        dist.barrier(group)
    begun = time.perf_counter()
    out = here
    if layer.feed_forward_alone:
        out, _ = model.blocks[0].feed_forward(out, shard)
    else:
        for block in model.blocks:
            out, *_ = block(out, shard)
    out.square().mean().backward()
    totals = shard.ledger.totals()
    if group is None:
        return Pass(time.perf_counter() - begun, 0.0, 0)
    dist.barrier(group)
    seconds = time.perf_counter() - begun
    found = torch.tensor([totals.seconds_waited / shard.size, 0.0], dtype=torch.float64)
    most = torch.tensor([totals.bytes_sent])
    dist.all_reduce(found, group=group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return Pass(seconds, float(found[0]), int(most))


def split_shard(layer: Layer, length: int) -> SequenceShard:
    group = dist.group.WORLD
    return SequenceShard.split(length, group, expert_group=group, strategies=layer.strategies)


def strong(rank: int, world: int, names: list[str], length: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each layer: whole, split and apart, in turns."""
    rows = []
    for name in names:
        layer = LAYERS[name]
        tokens = min(length, layer.longest)
        x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))
        whole_model, model = make_model(layer, tokens, width, 0, 1), make_model(layer, tokens, width, rank, world)
        whole, split = SequenceShard.whole(tokens), split_shard(layer, tokens)
        half, half_x = SequenceShard.whole(tokens // world), x[:, : tokens // world]
        passes: dict[str, list[Pass]] = {"whole": [], "split": [], "apart": []}
        for _ in range(repeats + 1):
            if rank == 0:
                passes["whole"].append(run(layer, whole_model, x, whole))
            passes["split"].append(run(layer, model, x, split))
            if layer.work_is_linear:
                dist.barrier()
                begun = time.perf_counter()
                run(layer, whole_model, half_x, half)
                dist.barrier()
                passes["apart"].append(Pass(time.perf_counter() - begun, 0.0, 0))
        if rank == 0:
            rows.append(strong_row(name, tokens, world, passes))
            print(strong_line(rows[-1]), flush=True)
    return rows


def strong_row(name: str, length: int, world: int, passes: dict[str, list[Pass]]) -> dict[str, Any]:
    """Medians without the first round."""

    def median(kind: str, field: str) -> float:
        return statistics.median(getattr(one, field) for one in passes[kind][1:])

    whole, split = median("whole", "seconds"), median("split", "seconds")
    apart = median("apart", "seconds") if passes["apart"] else None
    return {
        "layer": name,
        "tokens": length,
        "processes": world,
        "whole_seconds": whole,
        "split_seconds": split,
        "speedup": whole / split,
        "machine_speedup": whole / apart if apart else None,
        "goal": LAYERS[name].goal,
        "wait_share": median("split", "waited") / split,
        "bytes_sent": passes["split"][-1].sent,
        "all_seconds": {kind: [one.seconds for one in found] for kind, found in passes.items()},
    }


STRONG_HEAD = (
    "| layer | tokens | 1 process, s | 2 processes, s | speed-up | goal | machine allows | wait | sent, bytes |"
)


def strong_line(row: dict[str, Any]) -> str:
    allows = f"{row['machine_speedup']:.2f}" if row["machine_speedup"] else "-"
    return (
        f"| {row['layer']} | {row['tokens']:,} | {row['whole_seconds']:.2f} | {row['split_seconds']:.2f} "
        f"| {row['speedup']:.2f} | {row['goal']} | {allows} | {row['wait_share']:.1%} | {row['bytes_sent']:,} |"
    )


def weak(rank: int, world: int, tokens: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each layer, `tokens` of them on every process."""
    rows = []
    for name in WEAK:
        layer, length = LAYERS[name], tokens * world
        model, shard = make_model(layer, length, width, rank, world), split_shard(layer, length)
        x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
        passes = [run(layer, model, x, shard) for _ in range(repeats + 1)][1:]
        middle = {field: statistics.median(getattr(one, field) for one in passes) for field in ("seconds", "waited")}
        rows.append({"layer": name, "processes": world, "tokens": length, **middle, "bytes_sent": passes[-1].sent})
    return rows


def weak_table(rows: list[dict[str, Any]]) -> list[str]:
    worlds = sorted({row["processes"] for row in rows})
    lines = ["| layer | " + " | ".join(f"P = {world}: sent, bytes | waited, s" for world in worlds) + " |"]
    lines.append("|---" * (1 + 2 * len(worlds)) + "|")
    for name in WEAK:
        cells = [row for row in rows if row["layer"] == name]
        line = " | ".join(f"{row['bytes_sent']:,} | {row['waited']:.3f}" for row in cells)
        lines.append(f"| {name} | {line} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="strong,weak,long")
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="comma-separated beginnings of layer names, of the strong part")
    parser.add_argument("--longest", type=int, default=1 << 20, help="bases, of the long part")
    parser.add_argument("--save", type=Path, default=RESULTS, help="folder for scaling.json and scaling.md")
    options = parser.parse_args()
    parts, lines = options.parts.split(","), list[str]()
    found: dict[str, Any] = {"machine": machine(threads=1)}
    if "strong" in parts:
        names = [name for name in LAYERS if any(name.startswith(only) for only in options.only.split(","))]
        print(STRONG_HEAD, flush=True)
        rows = on_processes(strong, 2, names, options.length, options.width, options.repeats)
        found["strong"] = rows
        lines += [STRONG_HEAD, "|---" * 9 + "|", *(strong_line(row) for row in rows), ""]
        save(options.save, found, lines)
    if "weak" in parts:
        found["weak"] = [row for world in (1, 2, 4, 8) for row in on_processes(weak, world, 4096, options.width, 3)]
        lines += [*weak_table(found["weak"]), ""]
        print("\n".join(weak_table(found["weak"])), flush=True)
        save(options.save, found, lines)
    if "long" in parts:
        found["long"] = [asdict(row) for row in long_context.measure(options.longest)]
        lines += long_context.table(found["long"])
        save(options.save, found, lines)


def save(folder: Path, found: dict[str, Any], lines: list[str]) -> None:
    """After each part: a later one may fail, or be interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "scaling.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
