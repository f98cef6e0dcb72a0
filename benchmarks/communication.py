"""Bytes that one layer moves per process when its sequence is split, counted by the ledger, beside what peers move.

    python -m benchmarks.communication [--width 64] [--lengths 4096,16384] [--processes 2,4,8] [--json FILE]

Counted: forward and backward, sent by the busiest process, float32, batch 1. `all-to-all` is what exchanging length for
channels would send for the same layer and dtype: Megatron's context parallelism for Mamba (z, x, y, and B, C for
every process) and Mamba-2 (z, x, dt, y, and B, C for every process), savanna's for Hyena operators (three streams in,
one out). The second table carries the same formulas to 1,024 processes of 16,384 tokens each; it is arithmetic, not
measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longstride.models import ModelConfig, build_model
from longstride.parallel import SequenceShard, Strategies

from .processes import on_processes

BYTES = 4  # float32


@dataclass(frozen=True)
class Case:
    """A layer; what an all-to-all would move per token and process (numbers of width D for P processes)."""

    layers: str
    strategies: Strategies
    all_to_all: Callable[[int, int], float] | None
    state: Callable[[int], float] | None = None


STATE, HEAD = 16, 16
CASES: dict[str, Case] = {
    "mamba": Case("[mamba]", Strategies(), lambda D, P: 6 * D + 2 * STATE * P, lambda D: 2 * D * STATE + 2 * D),
    "mamba2": Case(
        f"[mamba2(state=32, head_dim={HEAD})]",
        Strategies(),
        lambda D, P: 6 * D + 2 * 32 * P + 2 * D / HEAD,
        lambda D: 2 * D * 32 + 2 * D / HEAD,
    ),
    "retnet": Case("[retnet(heads=2)]", Strategies(), None),
    "rwkv4": Case("[rwkv4]", Strategies(), None, lambda D: 3 * D),
    "hyena, modal": Case("[modal_hyena(heads=4)]", Strategies(), lambda D, P: 4 * D, lambda D: 2 * 2 * D),
    "hyena, medium": Case("[hyena_mr]", Strategies(), lambda D, P: 4 * D),
    "hyena, channels": Case("[hyena]", Strategies(convolution="channels"), lambda D, P: 4 * D),
    "hyena, length": Case("[hyena]", Strategies(convolution="length"), lambda D, P: 4 * D),
    "attention, heads": Case("[attention(heads=8, kv_heads=2)]", Strategies(attention="heads"), None),
    "attention, ring": Case("[attention(heads=8, kv_heads=2)]", Strategies(attention="ring"), None),
}


def count(rank: int, world: int, layers: str, strategies: Strategies, width: int, lengths: list[int]) -> list[int]:
    """Bytes sent by the busiest process, per length."""
    found = []
    for length in lengths:
        description: dict[str, Any] = {"vocab_size": 8, "width": width, "layers": layers, "feed_forward": "none"}
        model = build_model(ModelConfig.parse({**description, "hyena": {"max_length": max(lengths)}}))
        shard = SequenceShard.split(length, dist.group.WORLD, strategies=strategies)
        x = torch.randn(1, shard.local_length, width, requires_grad=True)
        out, *_ = model.blocks[0](x, shard)
        out.sum().backward()
        sent = torch.tensor([shard.ledger.totals().bytes_sent])
        dist.all_reduce(sent, dist.ReduceOp.MAX)
        found.append(int(sent))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lengths", default="4096,16384")
    parser.add_argument("--processes", default="2,4,8")
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lengths = [int(x) for x in options.lengths.split(",")]
    rows: list[dict[str, Any]] = []
    print(f"{'layer':<18}{'P':>3}" + "".join(f"{f'{length:,} tokens':>22}{'all-to-all':>16}" for length in lengths))
    for name, case in CASES.items():
        if not name.startswith(options.only):
            continue
        for world in (int(x) for x in options.processes.split(",")):
            sent = on_processes(count, world, case.layers, case.strategies, options.width, lengths)
            cells = ""
            for length, ours in zip(lengths, sent, strict=True):
                theirs = peer_bytes(case, options.width, world, length / world)
                rows.append({"layer": name, "processes": world, "length": length, "sent": ours, "all_to_all": theirs})
                cells += f"{ours:>20,} B" + (f"{theirs / ours:>14.1f} x" if theirs else f"{'-':>16}")
            print(f"{name:<18}{world:>3}{cells}", flush=True)
    print("\nmodelled: 16,384 tokens per process, width 4096, bfloat16 activations, float32 states; MB per process")
    print(f"{'layer':<18}{'P':>6}{'all gather':>14}{'logarithmic':>14}{'pipelined':>12}{'all-to-all':>14}")
    for name, case in CASES.items():
        if case.state is None or case.all_to_all is None or not name.startswith(options.only):
            continue
        for world in (8, 64, 1024):
            state = 2 * 4 * case.state(4096) / 1e6  # both ways
            theirs = 2 * 2 * 16_384 * case.all_to_all(4096, world) * (world - 1) / world / 1e6
            gathered, rounds = (world - 1) * state, ceil(log2(world)) * state
            print(f"{name:<18}{world:>6}{gathered:>14.2f}{rounds:>14.2f}{state:>12.2f}{theirs:>14.1f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def peer_bytes(case: Case, width: int, world: int, tokens: float) -> float:
    """Forward and backward bytes of an all-to-all for the same layer; 0 where no peer does it that way."""
    if case.all_to_all is None:
        return 0.0
    return 2 * BYTES * tokens * case.all_to_all(width, world) * (world - 1) / world


if __name__ == "__main__":
    main()
