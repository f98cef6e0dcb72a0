"""A store that is lost after a checkpoint's manifest is written: the checkpoint counts, and what was old goes later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from longstride.data import object_store
from longstride.workers.checkpoint import CheckpointError
from longstride.workers.manifest import MANIFEST_FILE, list_checkpoints
from longstride.workers.storage import Storage

from ..distributed import run_ranks
from ..workers.test_checkpoint import Notes
from .proxy import FaultProxy
from .test_store import own_proxy, trainer_of


def lose_the_store(rank: int, world_size: int, server: tuple[str, int]) -> dict[str, tuple[list[str], list[int], int]]:
    """A second checkpoint whose store refuses every connection before or after its manifest is written: what was
    said, what is committed once the store answers, and how many are left after a third checkpoint.
    """
    outcomes = {}
    with own_proxy(server) as proxy:
        for when in ("before", "after"):
            trainer = trainer_of(rank, world_size, when, "checkpoint.keep=1")
            trainer.step()
            trainer.save()
            heard = Notes()
            trainer.reporter = heard  # type: ignore[assignment]
            trainer.step()
            with impatience(), refusing_at_the_manifest(proxy, when):
                try:
                    trainer.save()
                except CheckpointError as error:
                    heard.noted(f"error: {error}")
            proxy.heal()
            committed = [found.step for found in list_checkpoints(trainer.run) if found.committed]
            trainer.step()
            trainer.save()
            outcomes[when] = heard.notes, committed, len(list_checkpoints(trainer.run))
    return outcomes


@contextmanager
def impatience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_store, "PATIENCE_SECONDS", 0.3)
        yield


@contextmanager
def refusing_at_the_manifest(proxy: FaultProxy, when: str) -> Iterator[None]:
    write = Storage.write_text

    def write_and_refuse(self: Storage, name: str, text: str) -> None:
        if name == MANIFEST_FILE and when == "before":
            proxy.refuse()
        write(self, name, text)
        if name == MANIFEST_FILE and when == "after":
            proxy.refuse()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "write_text", write_and_refuse)
        yield


def test_a_store_lost_after_the_manifest_leaves_a_checkpoint(server: tuple[str, int], store: FaultProxy) -> None:
    outcomes = run_ranks(lose_the_store, 1, server)[0]
    said, committed, left = outcomes["after"]
    assert len(said) == 1 and said[0].startswith("older checkpoints were not removed (")
    assert said[0].endswith("the next checkpoint tries again") and "\n" not in said[0]
    assert (committed, left) == ([1, 2], 1)
    # The same fault, a moment earlier: there is no checkpoint.
    said, committed, left = outcomes["before"]
    assert len(said) == 1 and said[0].startswith("error: checkpoints of run before: ")
    assert (committed, left) == ([1], 1)
