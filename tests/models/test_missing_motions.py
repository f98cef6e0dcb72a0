"""Negative controls: a mixer with one of its motions taken out or bent is caught by the comparison with one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from longstride.models import matrix_memory, token_shift
from longstride.models.mixers import conba_exact, flash, gau, lstm, rwkv4
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .test_split import Result, Split, assembled, expected_result, mixer_result, worst


def no_halo(x: Tensor, width: int, shard: SequenceShard) -> Tensor:
    return x.new_zeros(x.shape[0], width, *x.shape[2:])


def no_prefix(transition: Any, state: Tensor, shard: SequenceShard) -> Tensor:
    return transition.empty(state)


def without_reset(prefix: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda transition, state, shard: prefix(replace(transition, reset_B=None), state, shard)


def untransposed(prefix: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def bent(transition: Any, state: Tensor, shard: SequenceShard) -> Tensor:
        return prefix(replace(transition, matrix_BHNN=transition.matrix_BHNN.mT), state, shard)

    return bent


def own_tokens_only(pair: Any, queries: Tensor, keys: Tensor, shard: SequenceShard) -> Tensor:
    return pair(queries, keys, gau.Range(0, 0, None))


def own_state_only(recurrence: Any, initial: Tensor, shard: SequenceShard) -> tuple[Tensor, Tensor]:
    return recurrence(initial)


# (case, where, which motion, what is put in its place of the real one)
FAULTS: dict[str, tuple[str, Any, str, Callable[[Any], Any]]] = {
    "rwkv4 without its token shift's halo": ("rwkv4", token_shift, "halo", lambda real: no_halo),
    "rwkv4 without its sums": ("rwkv4", rwkv4, "prefix_state", lambda real: no_prefix),
    "rwkv4 through a document's start": ("rwkv4", rwkv4, "prefix_state", without_reset),
    "rwkv7 without its memory": ("rwkv7", matrix_memory, "prefix_state", lambda real: no_prefix),
    "rwkv7 through a document's start": ("rwkv7", matrix_memory, "prefix_state", without_reset),
    "rwkv7 with its transitions the other way round": ("rwkv7", matrix_memory, "prefix_state", untransposed),
    "conba without its state": ("conba, linear", matrix_memory, "prefix_state", lambda real: no_prefix),
    "flash without the chunk before": ("flash", flash, "halo", lambda real: no_halo),
    "flash without its sum": ("flash", flash, "prefix_state", lambda real: no_prefix),
    "flash through a document's start": ("flash", flash, "prefix_state", without_reset),
    "gau without earlier keys": ("gau", gau, "pair_sum", lambda real: own_tokens_only),
    "lstm without its turn": ("lstm", lstm, "sequential_state", lambda real: own_state_only),
    "exact conba without its turn": ("conba, exact", conba_exact, "sequential_state", lambda real: own_state_only),
}
# in one row a document begins inside the second of three shards, where what came before must stop; in the other none
SPLIT = Split((0, 9, 18, 30), [[12], []])


def faulty_results(rank: int, world_size: int) -> dict[str, Result]:
    results = {}
    for label, (case, module, motion, fault) in FAULTS.items():
        real = getattr(module, motion)
        setattr(module, motion, fault(real))
        results[label] = mixer_result(case, SPLIT, SPLIT.shard(dist.group.WORLD))
        setattr(module, motion, real)
    return results


@pytest.fixture(scope="module")
def faulty() -> list[dict[str, Result]]:
    return run_ranks(faulty_results, 3)


@pytest.mark.parametrize("label", FAULTS)
def test_a_missing_motion_is_noticed(label: str, faulty: list[dict[str, Result]]) -> None:
    case = FAULTS[label][0]
    error, _ = worst(assembled([results[label] for results in faulty]), expected_result("mixer", case, SPLIT))
    assert error > 1e-6
