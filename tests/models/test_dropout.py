"""Dropout after the embedding: the right numbers, the right share of them, the same ones however a step is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.models import DropoutKey, language_model
from longstride.models import dropout as dropout_module
from longstride.models.dropout import dropout, dropped
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import MODEL_CASES, SMALL, make_model, numbers
from .test_split import BATCH, TOLERANCE, Result, Split, assembled, gradients, worst

KEY = DropoutKey(seed=3, step=17)
SHARE = 0.3
# recomputed layers, experts and values passed between layers among them
CASES: dict[str, dict[str, Any]] = {
    **MODEL_CASES,
    "noise": {
        "layers": "[conba(variant=linear), conba(variant=exact)+mlp, mamba, conba(variant=exact, solver=newton)]",
        "feed_forward": "none",
        "conba": {"state": 4, "dt_max": 0.5, "noise": 0.3},
        "recompute": True,
    },
}
NAMES = list(CASES)
SPLITS = [Split((0, 11, 13, 24), [12, 20]), Split((0, 5, 23, 24), [[3, 10, 19], [12]]), Split((0, 1, 2, 17))]
SPREAD = Split((0, 9, 20), [4, 12])


def split_mix(key: int, count: int) -> list[int]:
    """The first numbers of SplitMix64, as its authors write it."""
    found, state = [], key % 2**64
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def signed_halves(number: int) -> list[int]:
    """The low and the high 32 bits."""
    halves = (number % 2**32, number >> 32)
    return [half - 2**32 if half >= 2**31 else half for half in halves]


@pytest.mark.parametrize("width", [6, 7])
def test_the_mask_is_what_the_generator_says(width: int) -> None:
    assert split_mix(1234567, 2) == [6457827717110365317, 3203168211198807973]  # as published
    x_BTD = torch.ones(3, 5, width)
    pairs = (width + 1) // 2
    below = SHARE * 2**32 - 2**31
    expected = []
    for stream in KEY.streams(3):
        draws = split_mix(stream, (4 + 5) * pairs)[4 * pairs :]
        tokens = [draws[place : place + pairs] for place in range(0, 5 * pairs, pairs)]
        expected.append([[half < below for draw in token for half in signed_halves(draw)][:width] for token in tokens])
    assert torch.equal(dropped(x_BTD, SHARE, KEY, 4), torch.tensor(expected))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_and_the_mean_stays(probability: float) -> None:
    x_BTD = torch.ones(8, 500, 50, dtype=torch.float64)
    y_BTD = dropout(x_BTD, probability, KEY, 0)
    assert set(y_BTD.unique().tolist()) == {0.0, 1 / (1 - probability)}
    sigma = (probability * (1 - probability)) ** 0.5
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):  # altogether, and of each row, position and feature
        share = (y_BTD == 0).double().mean(dims)
        assert (share - probability).abs().max() < 5 * sigma * (share.numel() / x_BTD.numel()) ** 0.5
    assert abs(y_BTD.mean() - 1) < 5 * sigma / (1 - probability) / x_BTD.numel() ** 0.5


def test_rows_steps_seeds_positions_and_features_are_independent() -> None:
    x_BTD = torch.ones(2, 1000, 64)
    here = dropped(x_BTD, 0.5, KEY, 0)
    others = {
        "row": here.flip(0),
        "step": dropped(x_BTD, 0.5, replace(KEY, step=18), 0),
        "seed": dropped(x_BTD, 0.5, replace(KEY, seed=4), 0),
        "position": dropped(x_BTD, 0.5, KEY, 1),
        "feature": here.roll(1, dims=2),
        "pair": here.roll(2, dims=2),
    }
    for name, other in others.items():
        agreement = (here == other).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / here.numel() ** 0.5, name


def test_the_same_numbers_in_any_type_and_however_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BTD = numbers("x", 2, 13, 9)
    exact = dropout(x_BTD, SHARE, KEY, 5)
    half = dropout(x_BTD.bfloat16(), SHARE, KEY, 5)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half == 0, exact == 0)
    monkeypatch.setattr(dropout_module, "DRAWN_AT_ONCE", 30)
    assert torch.equal(dropout(x_BTD, SHARE, KEY, 5), exact)
    part = dropout(x_BTD[1:, 4:], SHARE, replace(KEY, first_row=1), 9)
    assert torch.equal(part, exact[1:, 4:])


def test_a_share_close_to_one_drops_everything() -> None:
    assert dropped(torch.ones(1, 100, 10), 1 - 1e-12, KEY, 0).all()


def result(name: str, split: Split, shard: SequenceShard, rows: slice = slice(0, BATCH)) -> Result:
    """Losses and gradients of this shard of these rows."""
    model = make_model({**CASES[name], "embedding_dropout": SHARE})
    generator = torch.Generator().manual_seed(0)
    tokens_BT, targets_BT = torch.randint(SMALL["vocab_size"], (2, BATCH, split.length), generator=generator)
    targets_BT[0, 1:3] = -100
    here = (rows, slice(shard.start, shard.stop))
    losses = model(tokens_BT[here], targets_BT[here], shard, replace(KEY, first_row=rows.start))
    losses.total.backward()
    return {"loss": torch.stack(losses).detach(), **gradients(model)}


def without(fault: str) -> Callable[[Tensor, float, DropoutKey, int], Tensor]:
    """Dropout that leaves out where the shard begins, or which rows are here."""
    if fault == "position":
        return lambda x_BTD, probability, key, start: dropout(x_BTD, probability, key, 0)
    return lambda x_BTD, probability, key, start: dropout(x_BTD, probability, replace(key, first_row=0), start)


def split_results(rank: int, world_size: int, names: list[str], fault: str) -> list[Result]:
    """Sequences split over all processes."""
    if fault:
        language_model.dropout = without(fault)
    return [result(name, split, split.shard(dist.group.WORLD)) for split in SPLITS for name in names]


def spread_results(rank: int, world_size: int, names: list[str], fault: str) -> list[Result]:
    """Sequences split in pairs of processes, each pair with a row of the batch."""
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    if fault:
        language_model.dropout = without(fault)
    shard = SPREAD.shard(pairs[rank // 2], token_group=dist.group.WORLD)
    return [result(name, SPREAD, shard, slice(rank // 2, rank // 2 + 1)) for name in names]


def errors(parts: list[list[Result]], splits: list[Split], names: list[str]) -> list[tuple[float, str]]:
    """How far the processes' results, put together, are from those of one process, by split and model."""
    cases = [(name, split) for split in splits for name in names]
    return [
        worst(assembled(list(found)), result(name, split, SequenceShard.whole(split.length, split.documents)))
        for (name, split), found in zip(cases, zip(*parts, strict=True), strict=True)
    ]


def test_split_equals_whole() -> None:
    found = errors(run_ranks(split_results, 3, NAMES, ""), SPLITS, NAMES)
    assert len(found) == len(SPLITS) * len(NAMES)
    assert max(found)[0] < TOLERANCE, max(found)


def test_batch_and_sequence_split_together_equal_whole() -> None:
    found = errors(run_ranks(spread_results, 4, NAMES, ""), [SPREAD], NAMES)
    assert max(found)[0] < TOLERANCE, max(found)


@pytest.mark.parametrize("fault", ["position", "row"])
def test_a_key_that_leaves_something_out_is_noticed(fault: str) -> None:
    names = ["every part"]
    for error, key in errors(run_ranks(spread_results, 4, names, fault), [SPREAD], names):
        assert error > 1e-3, key


def test_it_changes_training_and_nothing_else() -> None:
    case = MODEL_CASES["every part"]
    model, plain = make_model({**case, "embedding_dropout": SHARE}), make_model(case)
    tokens_BT, targets_BT = torch.randint(SMALL["vocab_size"], (2, 2, 19), generator=torch.Generator().manual_seed(0))
    expected = plain.loss(tokens_BT, targets_BT)
    assert torch.equal(plain.loss(tokens_BT, targets_BT, None, KEY), expected)
    assert torch.equal(model.loss(tokens_BT, targets_BT), expected)
    assert torch.equal(model.logits(tokens_BT), plain.logits(tokens_BT))
    assert torch.equal(model.scores(tokens_BT, targets_BT).loss_BT, plain.scores(tokens_BT, targets_BT).loss_BT)
    assert abs(model.loss(tokens_BT, targets_BT, None, KEY) - expected) > 1e-3
    assert torch.equal(model.loss(tokens_BT, targets_BT, None, KEY), model(tokens_BT, targets_BT, None, KEY).total)
