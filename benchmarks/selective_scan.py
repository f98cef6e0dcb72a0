"""Time and peak memory of the selective scan, forward and backward, beside a plain loop and mambapy's parallel scan.

    python -m benchmarks.selective_scan
    python -m benchmarks.selective_scan --lengths 4096 65536 --channels 256 --states 16 --threads 1

Every contestant and size runs in a process of its own, on the same float32 inputs: step sizes after softplus, gradients
of all five inputs. Time is the fastest of the repeats after one small warm-up (wall and CPU seconds); memory is the
growth of the process's peak resident size over its inputs (on a GPU: of the allocated bytes). mambapy is a peer, not a
dependency: `pip install --no-deps mambapy` to include it; without it the table says so.
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

CONTESTANTS = ("portable", "loop", "mambapy")


@dataclass(frozen=True)
class Case:
    """One size and how to run it."""

    contestant: str
    batch: int
    length: int
    channels: int
    states: int
    threads: int
    repeats: int
    device: str


@dataclass(frozen=True)
class Result:
    """Seconds and bytes of one forward and backward."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int


def portable(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Ours."""
    from longstride.kernels import selective_scan

    return selective_scan(u, delta, A, B, C)[0]


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence as printed, through autograd; unbound, since indexing x[t] makes the backward quadratic."""
    decay = torch.exp(delta.unsqueeze(-1) * A)
    entering = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    state = torch.zeros_like(entering[:, 0])
    states = []
    for a, x in zip(decay.unbind(1), entering.unbind(1), strict=True):
        state = a * state + x
        states.append(state)
    return (torch.stack(states, 1) @ C.unsqueeze(-1)).squeeze(-1)


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """github.com/alxndrTL/mamba.py: Blelloch's scan over all decays and inputs, as its MambaBlock calls it."""
    from mambapy.pscan import pscan  # type: ignore[import-not-found]

    decay = torch.exp(delta.unsqueeze(-1) * A)
    entering = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    return (pscan(decay, entering) @ C.unsqueeze(-1)).squeeze(-1)


def make_inputs(case: Case, length: int) -> list[Tensor]:
    """Those of a fresh Mamba layer: rates -1 .. -N, step sizes log-uniform between 1e-3 and 1e-1."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, length)
    steps = torch.exp(torch.empty(case.channels).uniform_(-6.9, -2.3, generator=generator))
    tensors = [
        torch.randn(*shape, case.channels, generator=generator),
        steps * (0.5 + torch.rand(*shape, case.channels, generator=generator)),
        -torch.arange(1.0, case.states + 1).repeat(case.channels, 1),
        torch.randn(*shape, case.states, generator=generator),
        torch.randn(*shape, case.states, generator=generator),
    ]
    return [tensor.to(case.device).requires_grad_() for tensor in tensors]


def forward_backward(scan: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """One pass; the gradients are dropped."""
    y = scan(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    if y.is_cuda:
        torch.cuda.synchronize()


def measure(case: Case) -> Result:
    """Run in a fresh process: its peak memory cannot be reset."""
    torch.set_num_threads(case.threads)
    scan = {"portable": portable, "loop": loop, "mambapy": mambapy}[case.contestant]
    on_gpu = case.device != "cpu"
    forward_backward(scan, make_inputs(case, 64))
    inputs = make_inputs(case, case.length)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
    walls, processors = [], []
    for _ in range(case.repeats):
        wall, processor = time.perf_counter(), time.process_time()
        forward_backward(scan, inputs)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result(min(walls), min(processors), max(peak - before, 0))


def run(case: Case) -> Result:
    """`measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (case,))


def table(results: list[tuple[Case, Result]]) -> str:
    """One line a result, with ratio to ours at the same length."""
    lines = [f"{'length':>8} {'scan':>10} {'wall s':>9} {'CPU s':>9} {'peak MiB':>9} {'time':>7} {'memory':>7}  ratios"]
    ours = {case.length: result for case, result in results if case.contestant == "portable"}
    for case, result in results:
        line = f"{case.length:>8} {case.contestant:>10} {result.wall_seconds:>9.3f} {result.cpu_seconds:>9.3f}"
        line += f" {result.peak_bytes / 2**20:>9.0f}"
        if (mine := ours.get(case.length)) is not None:
            memory = result.peak_bytes / max(mine.peak_bytes, 1)
            line += f" {result.wall_seconds / mine.wall_seconds:>6.1f}x {memory:>6.1f}x"
        lines.append(line)
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--loop-limit", type=int, default=16384, help="the loop keeps everything: longest it runs")
    parser.add_argument("--json", type=Path, help="also write the results there")
    return parser.parse_args()


def main() -> None:
    """Measure, print, save."""
    options = parse()
    contestants = list(options.contestants)
    if "mambapy" in contestants and importlib.util.find_spec("mambapy") is None:
        contestants.remove("mambapy")
        print("mambapy is not installed; without it (pip install --no-deps mambapy) there is no peer in this table")
    results = []
    for length in options.lengths:
        for contestant in contestants:
            if contestant == "loop" and length > options.loop_limit:
                continue
            sizes = (options.batch, length, options.channels, options.states)
            case = Case(contestant, *sizes, options.threads, options.repeats, options.device)
            results.append((case, run(case)))
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {options.threads} thread(s)"
    print(f"batch {options.batch}, {options.channels} channels, {options.states} states, float32, {where}")
    print(table(results))
    if options.json is not None:
        rows: list[dict[str, Any]] = [asdict(case) | asdict(result) for case, result in results]
        options.json.write_text(json.dumps({"torch": torch.__version__, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
