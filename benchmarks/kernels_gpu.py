"""Every kernel on a GPU beside its peers: forward and backward, bfloat16, time and peak memory, in one run.

    python -m benchmarks.kernels_gpu               all of it, under ten minutes
    python -m benchmarks.kernels_gpu --only scan   some groups

Peers take part where they are installed (mamba-ssm, causal-conv1d, fla-core, liger-kernel: pip install --no-deps); the
others are named as missing. Time is the median of ten passes after three, by CUDA events with the cache flushed before
each; memory is the growth of the allocated peak. Results go to results/kernels_gpu.json with the machine. Without a GPU
it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .measuring import MEMORY, RESULTS, TIME, Claim, Row, check, forward_backward, machine, save, table, verdict

BUDGET = 540.0  # seconds after which the remaining cases are left out, and named
GROUPS = (
    "scan", "dual", "gated", "modal", "long", "gated long", "short", "wkv4", "wkv7", "wkv4 state", "wkv7 stages",
    "scan stages", "dual read-out", "gated read-out", "modal read-out", "experts", "expert rows", "entropy", "norm",
    "swiglu", "rotary",
)  # fmt: skip
BASELINE = {group: f"{group}: ours" for group in GROUPS}
LONG_SCAN = {"batch": 1, "length": 65536, "channels": 4096, "states": 16}
WIDE_SCAN = {"batch": 8, "length": 4096, "channels": 2048, "states": 16}
DUAL = {"batch": 1, "length": 65536, "heads": 64, "width": 64, "states": 128}
MODAL = {"batch": 1, "length": 65536, "channels": 1024, "states": 16}
LONG = {"batch": 1, "length": 65536, "channels": 1024}
GATED = {"batch": 1, "length": 65536, "heads": 16, "keys": 64}
SHORT = {"batch": 1, "length": 65536, "channels": 4096, "width": 4}
CLAIMS = [
    Claim("scan as fast as mamba-ssm, one long sequence", "scan: ours", "scan: mamba-ssm", LONG_SCAN, TIME, 1.0),
    Claim("scan as fast as mamba-ssm, a wide batch", "scan: ours", "scan: mamba-ssm", WIDE_SCAN, TIME, 1.0),
    Claim("dual form within 10% of mamba-ssm", "dual: ours", "dual: mamba-ssm", DUAL, TIME, 1.1),
    Claim("dual form within 10% of fla-core", "dual: ours", "dual: fla retention", DUAL, TIME, 1.1),
    Claim("modal convolution twice as fast as the FFT", "modal: ours", "modal: filter and FFT", MODAL, TIME, 0.5),
    Claim("long convolution as fast as plain rfft", "long: ours", "long: plain rfft", LONG, TIME, 1.0),
    Claim("with half its memory", "long: ours", "long: plain rfft", LONG, MEMORY, 0.5),
    Claim(
        "twice as fast as attention at 8,192",
        "long: ours",
        "long: flash attention",
        {**LONG, "length": 8192},
        TIME,
        0.5,
    ),
    Claim("and at 65,536", "long: ours", "long: flash attention", LONG, TIME, 0.5),
    Claim("short convolution at 80% of copy bandwidth", "short: ours", "short: copies", SHORT, TIME, 1 / 0.8),
]


def plan() -> Iterator[tuple[str, str, dict[str, int]]]:
    """(group, case, sizes), the promised ones first."""
    for sizes in (LONG_SCAN, WIDE_SCAN):
        yield "scan", "scan: ours", sizes
        yield "scan", "scan: mamba-ssm", sizes
    for name in ("dual: ours", "dual: mamba-ssm", "dual: fla retention"):
        yield "dual", name, DUAL
    for name in ("gated: ours", "gated: fla"):
        yield "gated", name, GATED
    for length in (65536, 262144):
        yield "modal", "modal: ours", {**MODAL, "length": length}
        yield "modal", "modal: filter and FFT", {**MODAL, "length": length, "channels": 1024}
    for length in (1024, 8192, 65536, 1048576):
        sizes = {**LONG, "length": length, "channels": 1024 if length < 1048576 else 64}
        yield "long", "long: ours", sizes
        yield "long", "long: plain rfft", sizes
        if length <= 65536:
            yield "long", "long: flash attention", sizes
    for name in ("short: ours", "short: causal-conv1d", "short: copies"):
        yield "short", name, SHORT
    for name in ("experts: ours", "experts: loop"):
        yield "experts", name, {"tokens": 65536, "width": 2048, "hidden": 1024, "experts": 64}
    for name in ("expert rows: ours", "expert rows: index_select"):
        yield "expert rows", name, {"tokens": 65536, "width": 2048, "experts": 64}
    for name in ("entropy: ours", "entropy: naive", "entropy: liger"):
        yield "entropy", name, {"tokens": 16384, "width": 2048, "vocabulary": 65536}
    for name in ("norm: ours", "norm: F.rms_norm", "swiglu: ours", "swiglu: autograd"):
        yield name.split(":")[0], name, {"tokens": 65536, "width": 4096}
    for name in ("gated long: ours", "gated long: plain rfft"):
        yield "gated long", name, LONG
    for operation, other in (("wkv4", "fla"), ("wkv4 state", "whole recurrence")):
        for name in ("ours", other):
            yield operation, f"{operation}: {name}", {"batch": 4, "length": 16384, "channels": 2048}
    for operation, other in (("wkv7", "fla"), ("wkv7 stages", "two passes")):
        for name in ("ours", other):
            yield operation, f"{operation}: {name}", {"batch": 4, "length": 8192, "heads": 32, "width": 64}
    for name in ("scan stages: ours", "scan stages: two scans"):
        yield "scan stages", name, LONG_SCAN
    for what, sizes in (("dual", DUAL), ("gated", GATED), ("modal", MODAL)):
        for other in ("ours", "second pass"):
            yield f"{what} read-out", f"{what} read-out: {other}", sizes
    for name in ("rotary: ours", "rotary: autograd"):
        yield "rotary", name, {"batch": 1, "length": 65536, "heads": 32, "width": 128}


# What a case is taken to cost, generously: compiling its kernels (of peers that try many configurations, and of ours),
# then passes at a tenth of an H100's bandwidth and a quarter of its attention's rate, or one step of a recurrence in
# twenty microseconds. Nothing of it was measured; it keeps the plan within BUDGET.
COMPILING = {"ours": 8.0, "wkv7: ours": 16.0, "mamba-ssm": 25.0, "fla": 25.0, "fla retention": 25.0}
SIMPLE = ("expert rows", "norm", "rotary", "swiglu")  # two or three short kernels: four seconds
PASSES, BYTES_A_SECOND, OPERATIONS_A_SECOND, SECONDS_A_STEP = 15, 3e11, 1e14, 20e-6


def estimated_seconds(name: str, sizes: dict[str, int]) -> float:
    """An upper guess for one case: start, compilation, and all its passes."""
    operation, kind = name.split(": ")
    tokens = sizes.get("batch", 1) * sizes.get("length", sizes.get("tokens", 1))
    width = sizes.get("channels", sizes.get("heads", 1) * sizes.get("width", sizes.get("keys", 1)))
    if "vocabulary" in sizes or "hidden" in sizes:
        wide = sizes.get("vocabulary", sizes.get("hidden", 1))
        a_pass = 8 * tokens * sizes["width"] * wide / OPERATIONS_A_SECOND
    elif kind == "flash attention":
        a_pass = 7 * tokens * sizes["length"] * width / OPERATIONS_A_SECOND
    else:
        a_pass = 40 * 4 * tokens * width / BYTES_A_SECOND  # some forty tensors of single precision go by
    if operation == "wkv4" or kind == "whole recurrence":
        a_pass = max(a_pass, sizes["length"] * SECONDS_A_STEP)
    compiling = 4.0 if operation in SIMPLE and kind == "ours" else COMPILING.get(name, COMPILING.get(kind, 0.5))
    return 1.0 + compiling + PASSES * a_pass


def time_passes(function: Callable[..., Any], inputs: Sequence[Tensor], passes: int) -> float:
    """Median seconds of a forward and backward; a write of 256 MiB before each empties the second-level cache."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(passes + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        forward_backward(function, inputs)
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events[3:]) / 1e3


def run(group: str, name: str, sizes: dict[str, int]) -> Row:
    """One row; a missing peer or a failure becomes a row that says so."""
    from .gpu_cases import CASES

    torch.cuda.empty_cache()
    try:
        inputs, function = CASES[name](**sizes)
        forward_backward(function, inputs)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(function, inputs)
        peak = torch.cuda.max_memory_allocated() - before
        seconds = time_passes(function, inputs, 10)
    except Exception as error:
        return Row(group, name, sizes, error=f"{type(error).__name__}: {error}".splitlines()[0][:120])
    return Row(group, name, sizes, seconds, seconds, peak, extra=floors(group, sizes, seconds))


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of 2 GiB."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    leaf = torch.zeros(1, device="cuda", requires_grad=True)
    seconds = time_passes(lambda leaf: (target.copy_(source), leaf * 1.0)[1], [leaf], 10)
    return 2 * source.nbytes / seconds


def floors(group: str, sizes: dict[str, int], seconds: float) -> dict[str, float]:
    """Share of the memory-bandwidth floor of the scan: every argument read and every result written once each way."""
    if group != "scan":
        return {}
    cells = sizes["batch"] * sizes["length"] * sizes["channels"]
    forward, backward = 4 * 2 * cells, 7 * 2 * cells  # u, delta, z, y; then those inputs, dy and three gradients
    return {"share_of_bandwidth_floor": (forward + backward) / copy_bandwidth() / seconds}


def check_bandwidth(rows: list[Row]) -> list[dict[str, Any]]:
    """The scan's claim on its floor, which is no comparison of two cases."""
    found = []
    for row in rows:
        if (share := row.extra.get("share_of_bandwidth_floor")) is not None and row.name == "scan: ours":
            what = f"scan at half of the bandwidth floor, {row.arguments}"
            found.append({"claim": what, "ratio": share, "bound": 0.5, "holds": share >= 0.5})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated groups: " + ", ".join(BASELINE))
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels_gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured, and nothing is claimed about GPUs")
        return
    import triton

    where = machine(torch.get_num_threads()) | {"triton": triton.__version__}
    wanted = [group for group in options.only.split(",") if group]
    begun, rows = time.monotonic(), []
    for group, name, sizes in plan():
        if wanted and group not in wanted:
            continue
        if time.monotonic() - begun > BUDGET:
            rows.append(Row(group, name, sizes, error=f"left out after {BUDGET:.0f} s"))
            continue
        rows.append(run(group, name, sizes))
        print(table(rows[-1:], {}).splitlines()[-1], flush=True)
        save(options.json, rows, where)  # what was measured stays if a later case takes the process down
    print(f"\n{time.monotonic() - begun:.0f} s")
    print(f"{where.get('gpu')}, torch {where['torch']}, triton {where['triton']}, forward and backward, bfloat16")
    print(table(rows, BASELINE))
    claims = check(rows, CLAIMS) + check_bandwidth(rows)
    print("\n".join(verdict(claim) for claim in claims))
    save(options.json, rows, where, claims)
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
