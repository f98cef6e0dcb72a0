"""Time and peak memory of one forward and backward pass, each case in a process of its own.

A case is a name of CASES of its module and keyword arguments; the entry makes (inputs, function of the inputs). Time is
the fastest of the repeats after a warm-up on the same inputs (wall and CPU seconds); memory is the growth of the peak
over the inputs: resident size of the process on a CPU, allocated bytes on a GPU.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"

Case = tuple[list[Tensor], Callable[..., Any]]


@dataclass(frozen=True)
class Row:
    """What one case took; `error` instead where it could not run."""

    group: str
    name: str
    arguments: dict[str, Any]
    wall_seconds: float = float("nan")
    cpu_seconds: float = float("nan")
    peak_bytes: int = 0
    error: str = ""
    extra: dict[str, float] = field(default_factory=dict)


TIME, MEMORY = "wall_seconds", "peak_bytes"


@dataclass(frozen=True)
class Claim:
    """A promise: case `one` takes at most `bound` times the time, or the memory, of case `other`, at the same sizes
    unless `other_sizes` are given."""

    what: str
    one: str
    other: str
    sizes: dict[str, int]
    measure: str
    bound: float
    other_sizes: dict[str, int] | None = None


def forward_backward(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """One pass over all differentiable inputs; the gradients are dropped."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)[:1]
    wanted = [x for x in inputs if x.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.ones_like(x) for x in outputs])


def _measure(
    module: str, group: str, name: str, arguments: dict[str, Any], threads: int, repeats: int, small: dict[str, Any]
) -> Row:
    torch.set_num_threads(threads)
    make = importlib.import_module(module).CASES[name]
    if small:  # builds and loads what is loaded lazily, without touching the peak
        forward_backward(*reversed(make(**arguments | small)))
    inputs, function = make(**arguments)
    before = psutil.Process().memory_info().rss
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        forward_backward(function, inputs)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Row(group, name, arguments, min(walls), min(processors), max(peak - before, 0))


def measure(
    module: str,
    group: str,
    name: str,
    arguments: dict[str, Any],
    *,
    threads: int,
    repeats: int,
    small: dict[str, Any] | None = None,
) -> Row:
    """Run in a fresh process: the peak of a process cannot be reset. A failure becomes a row that says so."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply(_measure, (module, group, name, arguments, threads, repeats, small or {}))
        except Exception as error:
            return Row(group, name, arguments, error=f"{type(error).__name__}: {error}".splitlines()[0])


def find(rows: Sequence[Row], name: str, sizes: dict[str, Any]) -> Row | None:
    """The row of a case, where it was measured."""
    return next((row for row in rows if row.name == name and row.arguments == sizes and not row.error), None)


def check(rows: Sequence[Row], claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """The claims whose rows were measured."""
    found = []
    for claim in claims:
        one, other = find(rows, claim.one, claim.sizes), find(rows, claim.other, claim.other_sizes or claim.sizes)
        if one is None or other is None:
            continue
        ratio = getattr(one, claim.measure) / max(getattr(other, claim.measure), 1e-12)
        outcome = {"claim": claim.what, "ratio": ratio, "bound": claim.bound, "holds": ratio <= claim.bound}
        if claim.measure == TIME and one.cpu_seconds != one.wall_seconds:  # steadier beside other work
            outcome["ratio_of_cpu_seconds"] = one.cpu_seconds / max(other.cpu_seconds, 1e-12)
        found.append(outcome)
    return found


def verdict(outcome: dict[str, Any]) -> str:
    """One line of `check`'s."""
    beside = f" (CPU seconds {outcome['ratio_of_cpu_seconds']:.3g})" if "ratio_of_cpu_seconds" in outcome else ""
    word = "holds" if outcome["holds"] else "MISSED"
    return f"{word:>7}  {outcome['claim']}: {outcome['ratio']:.3g}{beside}, bound {outcome['bound']:.3g}"


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    found: dict[str, Any] = {
        "processor": processor,
        "cores": psutil.cpu_count(),
        "threads": threads,
        "load_average": psutil.getloadavg()[0],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def table(rows: Sequence[Row], baseline: dict[str, str]) -> str:
    """One line a row; ratios to the row of the same group and arguments whose name is the group's baseline."""
    lines = [f"{'case':<28}{'size':>34}{'wall s':>10}{'CPU s':>10}{'peak MiB':>10}{'time':>9}{'memory':>9}"]
    for row in rows:
        size = " ".join(f"{key}={value:,}" for key, value in row.arguments.items() if isinstance(value, int))
        if row.error:
            lines.append(f"{row.name:<28}{size:>34}  not measured: {row.error}")
            continue
        line = f"{row.name:<28}{size:>34}{row.wall_seconds:>10.4f}{row.cpu_seconds:>10.4f}"
        line += f"{row.peak_bytes / 2**20:>10.0f}"
        if (base := find(rows, baseline.get(row.group, ""), row.arguments)) is not None:
            memory = row.peak_bytes / max(base.peak_bytes, 1)
            line += f"{row.wall_seconds / base.wall_seconds:>8.2f}x{memory:>8.2f}x"
        lines.append(line)
    return "\n".join(lines)


def save(path: Path, rows: Sequence[Row], where: dict[str, Any], claims: Sequence[dict[str, Any]] = ()) -> None:
    """Machine, rows and claims as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": where, "rows": [asdict(row) for row in rows], "claims": list(claims)}
    path.write_text(json.dumps(document, indent=1) + "\n")
