"""Growing the context: contexts that a run trains on before `data.context`, each for a number of steps.

    data: {context: 1M, batch: 1, schedule: "8k for 1000 steps, then 64k for 500 steps"}

trains 1,000 steps of 128 sequences of 8,192 tokens, 500 of 16 of 65,536, and the rest of `train.steps` with one of
1,048,576. A step has `context x batch` tokens throughout.

Every context has a global order of its own (`order.py`). A stage begins in its order as many tokens from the start as
the run has trained on: within a stage every token comes once until the corpus has been read, and the epochs of all
stages count the same tokens. Which tokens a shorter context has seen does not carry over to the next order.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LENGTH = re.compile(r"(\d+)\s*([kM]?)")
_PART = re.compile(r"(?P<context>\d+\s*[kM]?)(?:\s+for\s+(?P<steps>\d+)(?:\s+steps?)?)?")
_UNITS = {"": 1, "k": 1024, "M": 1024**2}


@dataclass(frozen=True)
class Stage:
    """Steps `first` + 1 to `last` of a run: sequences of `context` tokens, `batch` of them a step."""

    context: int
    batch: int
    first: int
    last: int


def parse_length(text: str) -> int:
    """Tokens: "8192", "8k" (1,024 each) or "1M" (1,048,576 each). ValueError: it is none of these."""
    match = _LENGTH.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no number of tokens; write it as 8192, 8k or 1M")
    return int(match[1]) * _UNITS[match[2]]


def parse_schedule(text: str) -> tuple[tuple[int, int], ...]:
    """(context, steps) of every stage that the text names, in order. ValueError: it is no schedule."""
    stages: list[tuple[int, int]] = []
    for part in re.split(r"\s*,\s*(?:then\s+)?|\s+then\s+", text.strip()):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"data.schedule: {part!r} is no stage; write '8k for 1000 steps, then 64k for 500 steps'")
        if match["steps"] is None:
            raise ValueError(
                f"data.schedule: {part!r} has no number of steps, such as '{part} for 500 steps'; the last context, "
                f"which lasts until train.steps, is data.context"
            )
        stages.append((parse_length(match["context"]), int(match["steps"])))
        if not all(stages[-1]):
            raise ValueError(f"data.schedule: {part!r}: context and steps must be at least 1")
    return tuple(stages)


def plan_stages(schedule: str | None, context: int, batch: int, steps: int) -> Iterator[Stage]:
    """The stages of a run of `steps` steps whose last has this context and batch.

    Raises ValueError: a stage's context does not divide the tokens of a step, or no step is left for the last stage.
    """
    tokens, first = context * batch, 0
    parts = parse_schedule(schedule) if schedule else ()
    for own, duration in parts:
        if tokens % own:
            raise ValueError(
                f"data.schedule: {own} does not divide the {tokens} tokens of a step (data.context={context} x "
                f"data.batch={batch}); take a context that does, or another data.batch"
            )
        yield Stage(own, tokens // own, first, first + duration)
        first += duration
    if first and first >= steps:
        raise ValueError(
            f"data.schedule: its stages take {first} steps and leave none of train.steps={steps} for "
            f"data.context={context}; set train.steps above {first}"
        )
    yield Stage(context, batch, first, steps)
