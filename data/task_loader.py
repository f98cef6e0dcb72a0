"""The batches of a task: every process makes the rows of its data rank and keeps its slice of them."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch

from .loader import IGNORED, Batch, BatchLoader, own_rows
from .order import Permutation
from .tasks import Task


class ExampleReader:
    """This process's rows and slice of a batch of examples; see `SequenceLoader` for the arguments and errors."""

    def __init__(
        self,
        task: Task,
        split: str,
        batch: int,
        data_rank: int,
        data_size: int,
        bounds: tuple[int, int] | None,
        seed: int = 0,
    ) -> None:
        self.task, self.split, self.batch, self.seed = task, split, batch, seed
        self.start, self.stop = bounds or (0, task.context)
        self.rows = own_rows(task.context, batch, data_rank, data_size, (self.start, self.stop))

    def read(self, numbers: Sequence[int | None], step: int) -> Batch:
        """The batch of these examples, one a global row; None is a row of padding without targets."""
        tokens_BT = np.zeros((len(self.rows), self.stop - self.start), dtype=np.int64)
        targets_BT = np.full_like(tokens_BT, IGNORED)
        for row, place in enumerate(self.rows if self.start < self.stop else ()):
            number = numbers[place]
            if number is not None:
                example = self.task.example(self.split, number, self.seed)
                tokens_BT[row] = example.tokens[self.start : self.stop]
                targets_BT[row] = example.targets[self.start : self.stop]
        num_targets = sum(number is not None for number in numbers) * self.task.num_targets(self.split)
        starts = tuple(() for _ in self.rows)
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT), starts, step, num_targets)


class TaskLoader(BatchLoader):
    """The training batches of a task.

    Batch number `step` holds the examples [step * batch, (step + 1) * batch), whatever the mesh. With a training set of
    limited size, that many examples are an epoch, in an order that changes with it.

    Arguments and errors as of `SequenceLoader`; the context is the task's.
    """

    def __init__(
        self,
        task: Task,
        batch: int,
        *,
        seed: int,
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        reader = ExampleReader(task, "train", batch, data_rank, data_size, bounds, seed)
        size = task.common.examples
        super().__init__(lambda step: reader.read(_training(size, seed, batch, step), step), start_step, prefetch)


class TaskValidation:
    """The first `sequences` held-out examples of a task; arguments and errors as of `SequenceLoader`."""

    def __init__(
        self,
        task: Task,
        batch: int,
        *,
        sequences: int,
        data_rank: int = 0,
        data_size: int = 1,
        bounds: tuple[int, int] | None = None,
    ) -> None:
        self._reader = ExampleReader(task, "validation", batch, data_rank, data_size, bounds)
        self.num_sequences = sequences

    def __len__(self) -> int:
        return -(-self.num_sequences // self._reader.batch)

    def __iter__(self) -> Iterator[Batch]:
        size = self._reader.batch
        for step, first in zip(range(len(self)), count(0, size), strict=False):
            numbers = [number if number < self.num_sequences else None for number in range(first, first + size)]
            yield self._reader.read(numbers, step)


def _training(size: int, seed: int, batch: int, step: int) -> list[int | None]:
    """The numbers of a step's examples."""
    numbers = range(step * batch, (step + 1) * batch)
    if not size:
        return list(numbers)
    places = (divmod(number, size) for number in numbers)
    return [Permutation(size, seed, "examples", epoch)(place) for epoch, place in places]
