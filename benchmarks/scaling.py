"""Strong scaling of every layer with its sequence split: forward and backward on 1 process and on P, in one run.

    python -m benchmarks.scaling [--length 131072] [--processes 2] [--width 64] [--repeats 3] [--only mamba,hyena]

One thread per process. Rank 0 first works alone on the whole sequence while the others sleep, then all work on their
parts; the two alternate and medians are compared, so that a noisy machine disturbs both alike. `wait` is the share of
the split step that rank 0 spent waiting for messages, `sent` the bytes it sent in one forward and backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longstride.models import ModelConfig, build_model
from longstride.parallel import SequenceShard, Strategies

from .processes import on_processes

Layer = tuple[dict[str, Any], dict[str, str]]

LAYERS: dict[str, Layer] = {
    "mamba": ({"layers": "[mamba]"}, {}),
    "hyena, by channels": ({"layers": "[hyena]"}, {"convolution": "channels"}),
    "hyena, by length": ({"layers": "[hyena]"}, {"convolution": "length"}),
    "attention, heads": ({"layers": "[attention]"}, {"attention": "heads"}),
    "attention, ring": ({"layers": "[attention]"}, {"attention": "ring"}),
    "experts": ({"layers": "[mamba+moe]"}, {}),
    "hybrid": ({"layers": "[mamba, hyena+moe, mamba, mamba+moe]"}, {}),
}


def measure(rank: int, world: int, name: str, length: int, width: int, repeats: int) -> dict[str, Any]:
    """Seconds of one forward and backward pass of a block, whole and split; on every rank, for rank 0's table."""
    description, strategies = LAYERS[name]
    if name.startswith("attention"):
        length = min(length, 16_384)  # quadratic work
    config = ModelConfig.model_validate(
        {
            "vocab_size": 256,
            "width": width,
            "hyena": {"max_length": length},
            "attention": {"heads": 4, "kv_heads": 2},
            "mlp": {"hidden": 2 * width},
            "moe": {"experts": 4, "top_k": 2, "hidden": width},
            **description,
        }
    )
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, width, generator=generator)
    group = dist.group.WORLD
    experts = group if "experts" in name or "hybrid" in name else None
    shards = {"whole": SequenceShard.whole(length)}
    shards["split"] = SequenceShard.split(length, group, strategies=Strategies(**strategies))
    del experts  # experts stay on every process here: their split is measured by bytes, the work by tokens
    seconds: dict[str, list[float]] = {"whole": [], "split": []}
    waited = 0.0
    for _ in range(repeats + 1):
        if rank == 0:
            seconds["whole"].append(step(model, x, shards["whole"]))
        dist.barrier()
        shards["split"].ledger.reset()
        seconds["split"].append(step(model, x, shards["split"]))
        dist.barrier()
        waited = shards["split"].ledger.seconds_waited / seconds["split"][-1]
    if rank:
        return {}
    whole, split = (statistics.median(seconds[kind][1:]) for kind in ("whole", "split"))
    sent = shards["split"].ledger.totals().bytes_sent
    return {
        "layer": name,
        "length": length,
        "whole_s": whole,
        "split_s": split,
        "speedup": whole / split,
        "wait_share": waited,
        "bytes_sent": sent,
    }


def step(model: Any, x: torch.Tensor, shard: SequenceShard) -> float:
    """Seconds of one forward and backward pass of the blocks."""
    here = x[:, shard.start : shard.stop].clone().requires_grad_()
    model.zero_grad()
    begun = time.perf_counter()
    out = here
    for block in model.blocks:
        out, *_ = block(out, shard)
    out.square().mean().backward()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="comma-separated beginnings of layer names")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    wanted = [n for n in LAYERS if any(n.startswith(o) for o in options.only.split(","))]
    rows = []
    print(f"{'layer':<22}{'tokens':>9}{'1 process':>12}{f'{options.processes} processes':>14}{'speedup':>9}{'wait':>7}")
    for name in wanted:
        row = on_processes(measure, options.processes, name, options.length, options.width, options.repeats)
        rows.append(row)
        print(
            f"{row['layer']:<22}{row['length']:>9,}{row['whole_s']:>10.2f} s{row['split_s']:>12.2f} s"
            f"{row['speedup']:>8.2f}x{row['wait_share']:>6.0%}{row['bytes_sent']:>14,} B",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
