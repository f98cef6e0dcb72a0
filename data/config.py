"""The `data` section of an experiment."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .corpus import Corpus
from .loader import SequenceLoader, ValidationSet


class DataConfig(BaseModel):
    """What is read, and in what pieces. Counts are global: they do not change with the number of workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: str | dict[str, float] = Field(
        "python-source", description="an embedded corpus, the path or URL of a prepared one, or {corpus: weight, ...}"
    )
    context: int = Field(8192, gt=0, description="tokens of a sequence")
    batch: int = Field(1, gt=0, description="sequences of one step, over all workers")
    validation_sequences: int = Field(8, gt=0, description="held-out sequences scored at each validation, at most")
    verify: Literal["size", "checksum"] = Field("size", description="how prepared shards are checked before training")
    on_bad_shard: Literal["stop", "skip"] = Field(
        "stop", description="what to do about a bad shard found by that check"
    )
    prefetch: int = Field(2, ge=0, description="batches read ahead in the background")

    def open(self) -> Corpus:
        """The corpus. CorpusError (a ValueError): it is unknown or cannot be read."""
        return Corpus.open(self.corpus, verify=self.verify, on_bad_shard=self.on_bad_shard)

    def training(
        self,
        corpus: Corpus,
        *,
        seed: int,
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
        start_step: int = 0,
    ) -> SequenceLoader:
        """The training loader of one process; see `SequenceLoader`."""
        return SequenceLoader(
            corpus,
            self.context,
            self.batch,
            seed=seed,
            data_rank=data_rank,
            data_size=data_size,
            bounds=bounds,
            start_step=start_step,
            prefetch=self.prefetch,
        )

    def validation(
        self,
        corpus: Corpus,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
    ) -> ValidationSet:
        """The held-out batches of one process; see `ValidationSet`."""
        return ValidationSet(
            corpus,
            self.context,
            self.batch,
            sequences=self.validation_sequences,
            data_rank=data_rank,
            data_size=data_size,
            bounds=bounds,
        )
