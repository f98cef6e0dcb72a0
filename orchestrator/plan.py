"""`longstride plan`: what a run will take, before it takes it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

import torch

from ..models import build_model
from ..workers import Experiment
from ..workers.display import count, mesh_name
from ..workers.launch import check_lengths
from ..workers.trained_parameters import freeze
from .forecast import Forecast, forecast
from .tables import amount_of_bytes, columns, parse_amount


def plan(arguments: Namespace) -> int:
    """Exit code 1 when it does not fit: scripts can ask. ValueError of one line for what does not divide."""
    limit = parse_amount(arguments.memory) if arguments.memory else None
    words = [*arguments.overrides, *([] if arguments.workers is None else [f"workers={arguments.workers}"])]
    experiment = Experiment.load(arguments.config, words)
    check_lengths(experiment)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stages = list(forecast(experiment, device))
    print("\n".join(_header(experiment, stages)))
    print()
    print(columns(_COLUMNS, [_row(stage) for stage in stages]))
    names = [f"{stage.stage.batch} x {stage.stage.context:,}" for stage in stages]
    print()
    print(_breakdown("MEMORY OF A PROCESS", names, [stage.memory for stage in stages]))
    if experiment.workers > 1:
        print()
        print(_breakdown("SENT BY A PROCESS IN A STEP", names, [stage.sent for stage in stages]))
    problem = _problem(experiment, stages, limit) if limit is not None else None
    if problem:
        print(f"\n{problem}")
    return 1 if problem else 0


_COLUMNS = ("STEPS", "TOKENS A STEP", "MESH", "TOKENS A PROCESS", "FLOP A STEP", "MEMORY A PROCESS", "SENT A PROCESS")


def _header(experiment: Experiment, stages: list[Forecast]) -> list[str]:
    model = build_model(experiment.model, device="meta")
    freeze(model, experiment.train)
    total, active = model.num_parameters(), model.num_active_parameters()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    part = f", {trained:,} trained" if trained < total else ""
    steps, tokens = experiment.train.steps, experiment.data.context * experiment.data.batch
    flops = " to ".join(dict.fromkeys(count(stage.flops / tokens) for stage in (stages[0], stages[-1])))
    processes = f"{experiment.workers} process{'es' if experiment.workers > 1 else ''}"
    return [
        f"{total:,} parameters, {active:,} of them at work on a token{part}; {experiment.train.dtype}, {processes}",
        f"{steps:,} steps of {tokens:,} tokens: {count(steps * tokens)} tokens, {flops} FLOP each",
    ]


def _row(found: Forecast) -> tuple[str, ...]:
    stage = found.stage
    return (
        f"{stage.first + 1}-{stage.last}",
        f"{stage.batch} x {stage.context:,}",
        mesh_name(asdict(found.degrees)) or "-",
        f"{found.tokens:,}",
        count(found.flops),
        amount_of_bytes(sum(found.memory.values())),
        amount_of_bytes(found.sent.total()),
    )


def _breakdown(title: str, names: list[str], parts: list[dict[str, int]]) -> str:
    """What a number of every stage is made of, the largest part of the last stage first."""
    rows = sorted({name for each in parts for name in each}, key=lambda name: -parts[-1].get(name, 0))
    cells = [(name, *(amount_of_bytes(each.get(name, 0)) for each in parts)) for name in rows]
    return columns((title, *names), cells)


def _problem(experiment: Experiment, stages: list[Forecast], limit: int) -> str | None:
    """Why it does not fit into `limit` bytes a process, and what to change; None if it does."""
    largest = max(stages, key=lambda stage: sum(stage.memory.values()))
    needed = sum(largest.memory.values())
    if needed <= limit:
        return None
    part = max(largest.memory, key=lambda name: largest.memory[name])
    return (
        f"does not fit: {amount_of_bytes(needed)} a process with {largest.stage.batch} x {largest.stage.context:,} "
        f"tokens, more than {amount_of_bytes(limit)}, {amount_of_bytes(largest.memory[part])} of it {part}; "
        f"{_remedy(experiment, largest, part)}"
    )


def _remedy(experiment: Experiment, found: Forecast, part: str) -> str:
    if part in ("activations", "loss") and found.at_once > 1:
        more = next(n for n in range(2, found.at_once + 1) if found.at_once % n == 0)
        return f"set train.accumulate={experiment.train.accumulate * more}, or more workers"
    if part == "activations" and not experiment.model.recompute:
        return "set model.recompute=true, or a larger parallel.sequence with more workers"
    if part in ("activations", "loss"):
        return f"set parallel.sequence={2 * found.degrees.sequence} with workers={2 * experiment.workers}"
    if found.degrees.replicate > 1:
        return "set parallel.replicate=1"
    if part == "gathered layers":
        return "a single layer is too large for such a device"
    return f"spread the parameters over more processes: workers={2 * experiment.workers}"
