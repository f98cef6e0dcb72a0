"""Bytes that one layer moves per process when its sequence is split, counted by the ledger, beside what peers move.

    python -m benchmarks.communication [--lengths 4096,16384] [--processes 2,4,8] [--save benchmarks/results]

Counted: forward and backward pass, sent by the busiest process, float32, batch 1. Beside it the all-to-all that peers
make for the same layer, made here as well (`parallel.reshard` there and back on streams of the same widths) and
counted in the same way: Megatron-LM's context parallelism for Mamba-2 exchanges z, x, delta and, for every process, B
and C, and the output back; for Mamba-1 the same streams without delta are taken. savanna's for Hyena operators
exchanges three streams and the output. The second table carries both to 1,024 processes of 16,384 tokens each: there
the bytes of a state and of an exchange are arithmetic, not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longstride.models import ModelConfig, build_model
from longstride.parallel import SequenceShard, Strategies, reshard

from .measuring import RESULTS
from .processes import on_processes

STATE_1, STATE_2, HEAD = 16, 32, 16


@dataclass(frozen=True)
class Exchange:
    """Widths of the streams that a peer exchanges, for a model of width D on P processes, and of what comes back."""

    there: Callable[[int, int], list[int]]
    back: Callable[[int], int]

    def bytes_sent(self, width: int, world: int, tokens: float, itemsize: int) -> float:
        """Forward and backward, of one process with `tokens` tokens."""
        numbers = sum(self.there(width, world)) + self.back(width)
        return 2 * itemsize * tokens * numbers * (world - 1) / world


MEGATRON_1 = Exchange(lambda D, P: [2 * D, 2 * D, STATE_1 * P, STATE_1 * P], lambda D: 2 * D)
MEGATRON_2 = Exchange(lambda D, P: [2 * D, 2 * D, 2 * D // HEAD, STATE_2 * P, STATE_2 * P], lambda D: 2 * D)
SAVANNA = Exchange(lambda D, P: [D, D, D], lambda D: D)


@dataclass(frozen=True)
class Case:
    """A layer, what a peer exchanges for it, and the numbers of its travelling state for a model of width D.

    `flat`: its bytes do not grow with the length.
    """

    layers: str
    peer: Exchange | None = None
    state: Callable[[int], int] | None = None
    flat: bool = True
    strategies: Strategies = field(default_factory=Strategies)


CHANNELS, LENGTH = Strategies(convolution="channels"), Strategies(convolution="length")
HEADS, RING = Strategies(attention="heads"), Strategies(attention="ring")
CASES: dict[str, Case] = {
    "Mamba": Case("[mamba]", MEGATRON_1, lambda D: 2 * D * (STATE_1 + 1)),
    "Mamba-2": Case(
        f"[mamba2(state={STATE_2}, head_dim={HEAD})]", MEGATRON_2, lambda D: 2 * D * STATE_2 + 2 * D // HEAD
    ),
    "RetNet": Case("[retnet(heads=2)]", None, lambda D: D * D),
    "linear attention": Case("[linear_attention(heads=4)]", None, lambda D: D * D // 4),
    "RWKV-4": Case("[rwkv4]", None, lambda D: 3 * D),
    "RWKV-7": Case("[rwkv7(head_dim=16)]", None, lambda D: 2 * D * 16),
    "S4D": Case("[s4d(state=32)]", None, lambda D: 32 * D),
    "H3": Case("[h3(state=32, shift=8)]", None, lambda D: 32 * D),
    "Hyena LI, 16 modes": Case("[hyena_li]", SAVANNA, lambda D: 16 * D),
    "Hyena MR, 128 taps": Case("[hyena_mr]", SAVANNA),
    "Hyena SE, 7 taps": Case("[hyena_se]", SAVANNA),
    "StripedHyena, modal": Case("[modal_hyena(heads=4)]", SAVANNA, lambda D: 2 * 2 * D),
    "Hyena, by channels": Case("[hyena]", SAVANNA, None, False, CHANNELS),
    "Hyena, by length": Case("[hyena]", SAVANNA, None, False, LENGTH),
    "attention, heads": Case("[attention(heads=8, kv_heads=2)]", None, None, False, HEADS),
    "attention, ring": Case("[attention(heads=8, kv_heads=2)]", None, None, False, RING),
}


def count(rank: int, world: int, width: int, lengths: list[int]) -> dict[str, list[tuple[int, int]]]:
    """For each case and length: bytes sent by the busiest process, by the layer here and by the peer's exchange."""
    found = {}
    for name, case in CASES.items():
        rows = []
        for length in lengths:
            shard = SequenceShard.split(length, dist.group.WORLD, strategies=case.strategies)
            make_layer(shard, case, width, max(lengths))
            ours, theirs = most_sent(shard), 0
            if case.peer is not None:
                shard.ledger.reset()
                make_exchange(shard, case.peer, width)
                theirs = most_sent(shard)
            rows.append((ours, theirs))
        found[name] = rows
    return found


def make_layer(shard: SequenceShard, case: Case, width: int, longest: int) -> None:
    description: dict[str, Any] = {"vocab_size": 8, "width": width, "layers": case.layers, "feed_forward": "none"}
    model = build_model(ModelConfig.parse({**description, "hyena": {"max_length": longest}}))
    x = torch.randn(1, shard.local_length, width, requires_grad=True)
    out, *_ = model.blocks[0](x, shard)
    out.sum().backward()


def make_exchange(shard: SequenceShard, peer: Exchange, width: int) -> None:
    streams = tuple(
        torch.randn(1, shard.local_length, channels, requires_grad=True) for channels in peer.there(width, shard.size)
    )
    arrived = reshard(streams, shard, to="channels")
    out = arrived[0].new_zeros(1, shard.length, peer.back(width) // shard.size) + sum(part.sum() for part in arrived)
    reshard(out, shard, to="length", channels=peer.back(width)).sum().backward()


def most_sent(shard: SequenceShard) -> int:
    sent = torch.tensor([shard.ledger.totals().bytes_sent])
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return int(sent)


def counted_rows(width: int, lengths: list[int], worlds: list[int]) -> list[dict[str, Any]]:
    """Of every case, number of processes and length; what does not agree with the formulas here stops the benchmark."""
    rows = []
    for world in worlds:
        for name, found in on_processes(count, world, width, lengths).items():
            case = CASES[name]
            for length, (ours, theirs) in zip(lengths, found, strict=True):
                rows.append({"layer": name, "processes": world, "length": length, "sent": ours, "peer": theirs})
                expected = case.peer.bytes_sent(width, world, length / world, 4) if case.peer else 0
                if theirs != expected:
                    raise SystemExit(f"{name}: a peer's exchange sends {theirs:,} bytes, expected {expected:,.0f}")
            if case.flat and len({ours for ours, _ in found}) > 1:
                raise SystemExit(f"{name}: bytes grow with the length: {found}")
    return sorted(rows, key=lambda row: list(CASES).index(row["layer"]))


def counted_table(rows: list[dict[str, Any]], lengths: list[int], worlds: list[int]) -> list[str]:
    """Of the longest length: every case a line."""
    longest = max(lengths)
    heads = " | ".join(f"P = {world}" for world in worlds)
    lines = [f"| layer | grows with length | {heads} | peer, P = {worlds[-1]} | ratio |"]
    lines.append("|---" * (4 + len(worlds)) + "|")
    for name, case in CASES.items():
        own = [row for row in rows if row["layer"] == name and row["length"] == longest]
        cells = " | ".join(f"{row['sent']:,}" for row in own)
        peer = own[-1]["peer"]
        ratio = f"{peer:,} | {peer / own[-1]['sent']:.1f}" if peer else "- | -"
        lines.append(f"| {name} | {'no' if case.flat else 'yes'} | {cells} | {ratio} |")
    return lines


def modelled_rows(width: int, tokens: int) -> list[dict[str, Any]]:
    """Bytes of a process, both ways: states in float32 by three strategies, the peer's exchange in bfloat16."""
    rows = []
    for name, case in CASES.items():
        if case.state is None or case.peer is None:
            continue
        for world in (8, 64, 256, 1024):
            state = 2 * 4 * case.state(width)
            rows.append(
                {
                    "layer": name,
                    "processes": world,
                    "all_gather": (world - 1) * state,
                    "logarithmic": ceil(log2(world)) * state,
                    "pipelined": state,
                    "peer": case.peer.bytes_sent(width, world, tokens, 2),
                }
            )
    return rows


def modelled_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| layer | P | all gather, MB | logarithmic, MB | pipelined, MB | peer, MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = " | ".join(f"{row[key] / 1e6:,.1f}" for key in ("all_gather", "logarithmic", "pipelined", "peer"))
        lines.append(f"| {row['layer']} | {row['processes']:,} | {cells} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lengths", default="4096,16384")
    parser.add_argument("--processes", default="2,4,8")
    parser.add_argument("--save", type=Path, default=RESULTS, help="folder for communication.json and communication.md")
    options = parser.parse_args()
    lengths, worlds = ([int(x) for x in text.split(",")] for text in (options.lengths, options.processes))
    counted, modelled = counted_rows(options.width, lengths, worlds), modelled_rows(4096, 16_384)
    lines = [*counted_table(counted, lengths, worlds), "", *modelled_table(modelled)]
    print("\n".join(lines))
    options.save.mkdir(parents=True, exist_ok=True)
    document = {"width": options.width, "counted": counted, "modelled": modelled}
    (options.save / "communication.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.save / "communication.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
