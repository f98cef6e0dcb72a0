"""Negative controls: a mixer with one of its motions taken out or bent is caught by the comparison with one process.

Motions are broken inside `parallel`, and every registered mixer whose ledger shows one must notice; a mixer that is
added to the registry is held to that without another line.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.kernels.wkv7 import Wkv7Stages, begin_wkv7
from longstride.models.mixers import matrix_memory
from longstride.parallel import SequenceShard, Strategies, Transition
from longstride.parallel.prefix import _Flight
from longstride.parallel.ring import Ring
from tests.distributed import run_ranks

from .cases import MIXER_CASES
from .test_split import Result, Split, assembled, expected_result, mixer_result, worst

# modules whose names in `parallel` are those of their functions
HALO, SEQUENTIAL = (importlib.import_module(f"longstride.parallel.{name}") for name in ("halo", "sequential"))
# in one row a document begins inside the second of three shards, where what came before must stop, and more than a long
# chunk before the third; in the other row none does
SPLIT = Split((0, 14, 32, 41), [[16], []])
# a solver that takes long, and solves the whole recurrence whatever a message says of where documents begin
NAMES = [name for name in MIXER_CASES if name != "conba, exact, by Newton's method"]
NOTICED = 1e-6


def no_decay() -> AbstractContextManager[Any]:
    """States cross shards as they are."""

    def unmoved(self: Transition, travelling: Tensor | None, tokens: int, state: Tensor, **_: bool) -> Tensor:
        # of the same inputs as ever, so that the backward pass finds them
        return state + sum(0 * (part.real if part.is_complex() else part).sum() for part in self.inputs())

    stack = ExitStack()
    for kind in Transition.__subclasses__():
        stack.enter_context(mock.patch.object(kind, "apply", unmoved))
    return stack


def no_state() -> AbstractContextManager[Any]:
    """Nothing arrives, forward and backward."""

    def nothing(self: _Flight, state: Tensor, *, reverse: bool) -> None:
        self._land = lambda: self.transition.empty(state)

    return mock.patch.object(_Flight, "_send", nothing)


def no_halo() -> AbstractContextManager[Any]:
    def zeros(x: Tensor, width: int, shard: SequenceShard) -> Tensor:
        return x.new_zeros(x.shape[0], width, *x.shape[2:])

    return mock.patch.object(HALO, "_fetch", zeros)


def own_keys_only() -> AbstractContextManager[Any]:
    meetings = Ring.meetings
    return mock.patch.object(
        Ring, "meetings", lambda self, visitor: meetings(self, visitor) if visitor == self.place else []
    )


FAULTS: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "no decay": ("decay", no_decay),
    "no reset": ("reset", lambda: mock.patch.object(Transition, "reset", None)),
    "no state": ("prefix_state", no_state),
    "no halo": ("halo", no_halo),
    "no turn": ("sequential_state", lambda: mock.patch.object(SEQUENTIAL, "_pass", lambda *_, **__: None)),
    "own keys only": ("round a ring", own_keys_only),
}
# the families that must be found to make each motion, so that the controls cannot become empty unnoticed
AT_LEAST = {
    "no decay": {"mamba", "mamba2", "retnet", "s4", "s4d", "h3", "hyena_li", "modal_hyena", "rwkv4", "rwkv7"},
    "no reset": {"mamba", "mamba2", "retnet", "linear_attention", "s4", "s4d", "h3", "hyena_li", "rwkv4"},
    "no state": {"mamba", "mamba2", "retnet", "linear_attention", "s4", "s4d", "h3", "hyena_li", "rwkv4", "rwkv7"},
    "no halo": {"mamba", "mamba2", "hyena", "hyena_mr", "hyena_se", "h3", "rwkv4", "rwkv7", "flash"},
    "no turn": {"lstm", "conba, exact"},
    "own keys only": {"attention", "gau"},
}


def motions(name: str) -> tuple[set[str], SequenceShard]:
    """What a mixer's ledger shows, "decay" where a state on its way is more than passed on, "reset" where it is told
    of documents that begin (a matrix memory's transition has them in it, see `bent_results`)."""
    shard = SPLIT.shard(dist.group.WORLD, strategies=Strategies(attention="ring"))
    decays, resets = [], []

    def watched(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watching(self: Transition, travelling: Tensor | None, tokens: int, state: Tensor, **how: bool) -> Tensor:
            moved = apply(self, travelling, tokens, state, **how)
            decays.append(not torch.equal(moved, state))
            return moved

        return watching

    def watching_reset(self: Transition) -> Tensor | None:
        reset_B = getattr(self, "reset_B", None)
        resets.append(reset_B is not None)
        return reset_B

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Transition, "reset", property(watching_reset)))
        for kind in Transition.__subclasses__():
            stack.enter_context(mock.patch.object(kind, "apply", watched(kind.apply)))
        mixer_result(name, SPLIT, shard)
    found = {motion.split(".")[0] for motion in shard.ledger.by_motion()}
    found |= {name for name, told in (("decay", decays), ("reset", resets)) if any(told)}
    if found & {"ring", "pair_sum"}:
        found.add("round a ring")
    return found, shard


def faulty_results(rank: int, world_size: int) -> dict[tuple[str, str], Result]:
    """By fault and name, of the mixers whose motion is at fault."""
    seen = {name: motions(name) for name in NAMES}
    everyone: list[dict[str, set[str]]] = [{}] * world_size
    dist.all_gather_object(everyone, {name: found for name, (found, _) in seen.items()})
    results = {}
    for fault, (motion, broken) in FAULTS.items():
        for name, (_, shard) in seen.items():
            if any(motion in found[name] for found in everyone):
                with broken():
                    results[fault, name] = mixer_result(name, SPLIT, shard)
    return results


@pytest.fixture(scope="module")
def faulty() -> list[dict[tuple[str, str], Result]]:
    return run_ranks(faulty_results, 3)


@pytest.fixture(scope="module")
def right() -> dict[str, Result]:
    return {name: expected_result("mixer", name, SPLIT) for name in NAMES}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_mixer_notices(fault: str, faulty: list[dict[tuple[str, str], Result]], right: dict[str, Result]) -> None:
    names = {name for found, name in faulty[0] if found == fault}
    assert names >= AT_LEAST[fault]
    errors = {name: worst(assembled([found[fault, name] for found in faulty]), right[name])[0] for name in names}
    assert all(error > NOTICED for error in errors.values()), {n: e for n, e in errors.items() if e <= NOTICED}


def transposed(*stored: Tensor, **options: Any) -> Wkv7Stages:
    """Rotations go the other way round."""
    stages = begin_wkv7(*stored, **options)
    stages.transition = stages.transition.mT
    return stages


def unaware(*stored: Tensor, **options: Any) -> Wkv7Stages:
    """What leaves a shard is right, but that a document has begun in it does not show in the transition."""
    stages = begin_wkv7(*stored, **options)
    stages.transition = begin_wkv7(*stored).transition
    return stages


BENT = [(name, bend) for name in ("rwkv7", "conba, linear") for bend in (transposed, unaware)]


def bent_results(rank: int, world_size: int) -> list[Result]:
    results = []
    for name, bend in BENT:
        with mock.patch.object(matrix_memory, "begin_wkv7", bend):
            results.append(mixer_result(name, SPLIT, SPLIT.shard(dist.group.WORLD)))
    return results


def test_bent_matrices_are_noticed(right: dict[str, Result]) -> None:
    for (name, bend), results in zip(BENT, zip(*run_ranks(bent_results, 3), strict=True), strict=True):
        assert worst(assembled(list(results)), right[name])[0] > NOTICED, (name, bend)
