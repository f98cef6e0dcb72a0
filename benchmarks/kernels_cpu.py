"""Every kernel on the CPU beside what one would use instead: forward and backward, time and peak memory, in one run.

    python -m benchmarks.kernels_cpu                    all of it, some minutes on two idle cores
    python -m benchmarks.kernels_cpu --only scan,long   some groups
    python -m benchmarks.kernels_cpu --longest 65536    without the lengths beyond

Prints a table with ratios to ours, time and memory a token against length, and the project's targets with what was
measured; writes all with the machine to results/kernels_cpu.json and a plot of the scans' growth beside it. mambapy is
a peer, not a dependency: it takes part if it is installed (pip install --no-deps mambapy).
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from .measuring import MEMORY, RESULTS, TIME, Claim, Row, check, find, machine, measure, save, table, verdict

LENGTHS = (4096, 16384, 65536, 262144, 1048576)
# 64 channels or one head of 64
GROWING = (
    "selective scan",
    "state-space dual",
    "gated linear attention",
    "modal convolution",
    "wkv4",
    "wkv7",
    "long convolution",
)
# Not ours, beside them: how the library's transforms alone grow.
GROWN = (*GROWING, "long: best plain rfft, 64 channels")
BASELINE = {
    "scan": "scan: ours, portable",
    "long": "long: ours",
    "short": "short: ours",
    "experts": "experts: ours",
    "entropy": "entropy: ours",
    "norm": "norm: ours",
    "swiglu": "swiglu: ours",
}
PORTABLE, COMPILED, LOOP, PEER = "scan: ours, portable", "scan: ours, compiled", "scan: plain C++ loop", "scan: mambapy"
SHORT, MIDDLE, LONG = {"length": 4096}, {"length": 65536}, {"length": 1048576}
# What the project promises.
CLAIMS = [
    Claim("portable scan 8x faster than mambapy at 65,536", PORTABLE, PEER, MIDDLE, TIME, 1 / 8),
    Claim("with a tenth of its memory", PORTABLE, PEER, MIDDLE, MEMORY, 1 / 10),
    Claim("compiled scan 30x faster than mambapy at 65,536", COMPILED, PEER, MIDDLE, TIME, 1 / 30),
    Claim("compiled scan within 1.3x of a plain C++ loop", COMPILED, LOOP, MIDDLE, TIME, 1.3),
    *(
        # Half as much again as 256 times the tokens; an FFT's work grows with the logarithm of the length as well.
        Claim(
            f"{name} grows linearly, 4K to 1M", name, name, LONG, TIME, 384 * (21 / 13 if "long" in name else 1), SHORT
        )
        for name in (PORTABLE, COMPILED, *GROWING)
    ),
    Claim("long convolution as fast as plain rfft", "long: ours", "long: best plain rfft", MIDDLE, TIME, 1),
    Claim("with half its peak memory", "long: ours", "long: best plain rfft", MIDDLE, MEMORY, 0.5),
    Claim("experts as fast as a loop", "experts: ours", "experts: loop", {"tokens": 2048}, TIME, 1),
    Claim("entropy in 1.1x the naive time", "entropy: ours", "entropy: naive", {"tokens": 4096}, TIME, 1.1),
    Claim("with a fifth of its memory", "entropy: ours", "entropy: naive", {"tokens": 4096}, MEMORY, 0.2),
]


def plan(longest: int) -> Iterator[tuple[str, str, dict[str, int], int]]:
    """(group, case, sizes, repeats)."""
    lengths = [length for length in LENGTHS if length <= longest]
    for length in lengths:
        repeats = 5 if length <= 65536 else 1
        yield "scan", "scan: ours, portable", {"length": length}, repeats
        yield "scan", "scan: ours, compiled", {"length": length}, repeats
        if length <= 65536:
            yield "scan", "scan: plain C++ loop", {"length": length}, repeats
            yield "scan", "scan: mambapy", {"length": length}, min(repeats, 2)
        if length <= 4096:
            yield "scan", "scan: loop of PyTorch", {"length": length}, 1
    for length in [length for length in (4096, 65536) if length <= longest]:
        for name in ("long: ours", "long: plain rfft", "long: best plain rfft"):
            yield "long", name, {"length": length}, 5
        for width in (4, 24, 128):
            yield "short", "short: ours", {"length": length, "width": width}, 5
            yield "short", "short: conv1d", {"length": length, "width": width}, 5
    for name in ("experts: ours", "experts: loop"):
        yield "experts", name, {"tokens": 2048}, 15
    for name in ("entropy: ours", "entropy: naive"):
        yield "entropy", name, {"tokens": 4096}, 3
    for name in ("norm: ours", "norm: F.rms_norm"):
        yield "norm", name, {"tokens": 16384}, 5
    for name in ("swiglu: ours", "swiglu: autograd"):
        yield "swiglu", name, {"tokens": 16384}, 5
    for name in GROWN:
        for length in lengths:
            yield "growth", name, {"length": length}, 2 if length <= 65536 else 1


def growth(rows: list[Row]) -> str:
    """Microseconds and bytes of peak memory a token against length: flat where both grow linearly."""
    lengths = sorted({row.arguments["length"] for row in rows if row.group == "growth"})
    lines = [f"{'us and bytes a token':<36}" + "".join(f"{length:>18,}" for length in lengths)]
    for name in GROWN:
        cells = []
        for length in lengths:
            row = find(rows, name, {"length": length})
            text = "-" if row is None else f"{row.wall_seconds / length * 1e6:.2f} {row.peak_bytes / length:,.0f}"
            cells.append(f"{text:>18}")
        lines.append(f"{name:<36}" + "".join(cells))
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Seconds and memory of the scans against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name in dict.fromkeys(row.name for row in rows if row.group == "scan" and not row.error):
        own = [row for row in rows if row.name == name and not row.error]
        lengths = [row.arguments["length"] for row in own]
        axes[0].loglog(lengths, [row.wall_seconds for row in own], marker="o", label=name.removeprefix("scan: "))
        axes[1].loglog(lengths, [row.peak_bytes / 2**20 for row in own], marker="o")
    for axis, label in zip(axes, ("seconds, forward and backward", "peak MiB beyond the inputs"), strict=True):
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.suptitle("Selective scan on a CPU: 256 channels, 16 states, float32")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated groups: scan, long, short, experts, entropy, ...")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels_cpu.json")
    options = parser.parse_args()
    wanted = [group for group in options.only.split(",") if group]
    if importlib.util.find_spec("mambapy") is None:
        print("mambapy is not installed: no peer for the scan in this table (pip install --no-deps mambapy)")
    where = machine(options.threads)
    rows = []
    for group, name, sizes, repeats in plan(options.longest):
        if (wanted and group not in wanted) or ("mambapy" in name and importlib.util.find_spec("mambapy") is None):
            continue
        small = {"length": 256} if "length" in sizes else {"tokens": 64}
        rows.append(
            measure("benchmarks.cpu_cases", group, name, sizes, threads=options.threads, repeats=repeats, small=small)
        )
        print(table(rows[-1:], {}).splitlines()[-1], flush=True)
        save(options.json, rows, where)  # what was measured stays if the run is cut short
    print(f"\n{where['processor']}, {options.threads} threads, torch {where['torch']}, forward and backward, float32")
    print(table(rows, BASELINE))
    if any(row.group == "growth" for row in rows):
        print(growth(rows))
    claims = check(rows, CLAIMS)
    print("\n".join(verdict(claim) for claim in claims))
    save(options.json, rows, where, claims)
    if any(row.group == "scan" for row in rows):
        plot(rows, options.json.with_suffix(".png"))
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
