"""What a run tells whoever watches it: plain values, so that they can come from another machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from .metrics import StepRecord


@dataclass(frozen=True)
class RunStart:
    """Known once the model is built and, on a resume, the checkpoint is loaded.

    Attributes:
        step: steps finished already; steps: how many there will be; until: with which the stage of this context ends.
        parameters: of the model; trained: those that are not frozen.
        parallel: degrees by name.
    """

    name: str
    url: str
    step: int
    steps: int
    until: int
    parameters: int
    trained: int
    corpus: str
    context: int
    batch: int
    workers: int
    parallel: dict[str, int]
    dtype: str
    device: str


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        url: the run's directory.
        finished: all steps were made; otherwise it was asked to stop and can be resumed.
        validation_loss: nats per token after the last step; None where the run stopped before a validation.
        seconds: wall time of this start, from the making of the model to the end of the last step.
        prompt, sample: the sampled continuation; empty where the run was stopped, and of a run on audio.
        tracking_uri: of the MLflow store; None where nothing was tracked.
        notes: what a person should know, a line each.
        audio: the run's tokens are samples of sound, which is not printed.
    """

    name: str
    url: str
    step: int
    steps: int
    tokens: int
    finished: bool
    loss: float | None
    validation_loss: float | None
    seconds: float
    prompt: str = ""
    sample: str = ""
    tracking_uri: str | None = None
    notes: list[str] = field(default_factory=list)
    audio: bool = False


class Reporter(Protocol):
    """Receives, on the first process alone, what happens; must not block."""

    def started(self, start: RunStart) -> None: ...

    def stepped(self, record: StepRecord) -> None: ...

    def noted(self, message: str) -> None:
        """A line for the person, such as a checkpoint that was skipped."""
        ...

    def finished(self, summary: Summary) -> None: ...


class Silent:
    """A Reporter that says nothing."""

    def started(self, start: RunStart) -> None: ...

    def stepped(self, record: StepRecord) -> None: ...

    def noted(self, message: str) -> None: ...

    def finished(self, summary: Summary) -> None: ...
