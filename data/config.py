"""The `data` section of an experiment."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from .corpus import Corpus
from .credentials import refuse_credentials
from .embedded import EMBEDDED
from .loader import BatchLoader, HeldOut, SequenceLoader, ValidationSet
from .opening import open_corpus
from .schedule import Stage, parse_length, parse_schedule, plan_stages
from .task_loader import TaskLoader, TaskValidation
from .tasks import TASKS, Task, TasksConfig


class _Place(TypedDict):
    data_rank: int
    data_size: int
    bounds: tuple[int, int] | None


class _Reading(TypedDict):
    seed: int
    start_step: int
    prefetch: int


def _length(value: Any) -> Any:
    return parse_length(value) if isinstance(value, str) else value


def _complete(name: str) -> str:
    """A prepared corpus's path written out, so that a run finds it from any directory; other names as they are."""
    path = Path(name).expanduser()
    known = "://" in name or name in EMBEDDED or name in TASKS
    return str(path.absolute()) if not known and path.is_dir() else name


Length = Annotated[int, BeforeValidator(_length)]  # tokens: 8192, or 8k


class DataConfig(BaseModel):
    """What is read, and in what pieces. Counts are global: they do not change with the number of workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: str | dict[str, float] = Field(
        "python-source",
        description="an embedded corpus, a task, the path or URL of a prepared corpus, or {corpus: weight, ...}",
    )
    context: Length = Field(8192, gt=0, description="tokens of a sequence, such as 8192, 8k or 1M")
    batch: int = Field(1, gt=0, description="sequences of one step, over all workers")
    schedule: str | None = Field(
        None, description="shorter contexts to begin with, such as '8k for 1000 steps, then 64k for 500 steps'"
    )
    validation_sequences: int = Field(8, gt=0, description="held-out sequences scored at each validation, at most")
    verify: Literal["size", "blocks", "checksum"] = Field(
        "blocks",
        description="how prepared shards are checked: sizes; also blocks as they are read; or all before training",
    )
    on_bad_shard: Literal["stop", "skip"] = Field(
        "stop", description="what to do about a shard found bad before training; one found later stops the run"
    )
    tasks: TasksConfig = Field(default=TasksConfig(), description="options of the synthetic tasks")
    prefetch: int = Field(2, ge=0, description="batches read ahead in the background")

    @field_validator("corpus")
    @classmethod
    def _is_complete_and_holds_no_secret(cls, corpus: str | dict[str, float]) -> str | dict[str, float]:
        for url in (corpus,) if isinstance(corpus, str) else corpus:
            refuse_credentials("data.corpus", url)
        if isinstance(corpus, str):
            return _complete(corpus)
        return {_complete(name): weight for name, weight in corpus.items()}

    @field_validator("schedule", mode="before")
    @classmethod
    def _can_be_read(cls, schedule: Any) -> str | None:
        if schedule is not None:
            parse_schedule(str(schedule))
        return schedule

    def stages(self, steps: int) -> tuple[Stage, ...]:
        """The stages of a run of so many steps: one without a schedule. ValueError: the schedule does not fit."""
        return tuple(plan_stages(self.schedule, self.context, self.batch, steps))

    def open(self) -> Corpus:
        """The corpus. CorpusError (a ValueError): it is unknown or cannot be read."""
        if isinstance(self.corpus, str) and self.corpus in TASKS:
            return self.tasks.open(self.corpus, self.context)
        return open_corpus(self.corpus, verify=self.verify, on_bad_shard=self.on_bad_shard)

    def training(
        self,
        corpus: Corpus,
        *,
        seed: int,
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
        start_step: int = 0,
    ) -> BatchLoader:
        """The training loader of one process; see `SequenceLoader`."""
        place: _Place = {"data_rank": data_rank, "data_size": data_size, "bounds": bounds}
        reading: _Reading = {"seed": seed, "start_step": start_step, "prefetch": self.prefetch}
        if isinstance(corpus, Task):
            return TaskLoader(corpus, self.batch, **reading, **place)
        return SequenceLoader(corpus, self.context, self.batch, **reading, **place)

    def validation(
        self,
        corpus: Corpus,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
    ) -> HeldOut:
        """The held-out batches of one process; see `ValidationSet`."""
        place: _Place = {"data_rank": data_rank, "data_size": data_size, "bounds": bounds}
        if isinstance(corpus, Task):
            return TaskValidation(corpus, self.batch, sequences=self.validation_sequences, **place)
        return ValidationSet(corpus, self.context, self.batch, sequences=self.validation_sequences, **place)
