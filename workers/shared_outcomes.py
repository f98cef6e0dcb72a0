"""What one process finds out, or every one of them, made known to all: results and failures alike.

A process that fails alone leaves the others waiting for its next message. Here all learn of it and raise the same.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

ResultT = TypeVar("ResultT")


class SharedOutcomes:
    """Work whose outcome is the same on every process; all processes of the group call each method alike.

    Args:
        group: of all processes, on the CPU; None: the default group.
        subject: what the work is about; a failure's line begins with it.
        failure: raised on all processes, with one line, when the work fails on one.
        as_is: what `from_first` raises on all as it is instead.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        subject: str = "",
        failure: type[Exception] = RuntimeError,
        as_is: tuple[type[Exception], ...] = (Exception,),
    ) -> None:
        self.group, self.subject, self.failure, self.as_is = group, subject, failure, as_is
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def from_first(self, work: Callable[[], ResultT]) -> ResultT:
        """What `work` returns on the first process."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except self.as_is as error:
                outcome[1] = error
            except Exception as error:
                outcome[1] = self.failure(f"{self.subject}: {error or type(error).__name__}")
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        result, error = outcome
        if error is not None:
            raise error
        return result

    def from_all(self, work: Callable[[], ResultT]) -> list[ResultT]:
        """What `work` returns on every process, by rank."""
        result: Any = None
        problem = ""
        try:
            result = work()
        except Exception as error:
            problem = f"process {self.rank}: {error or type(error).__name__}"
        results, problems = zip(*self.gather((result, problem)), strict=True)
        if found := [*filter(None, problems)]:
            raise self.failure(f"{self.subject}: {found[0]}")
        return list(results)

    def gather(self, value: ResultT) -> list[ResultT]:
        """Every process's value, by rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def gloo_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A new group of all processes for traffic of its own, on the CPU. All processes call it, in the same order."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group
