"""Every mixer and whole models, split over processes, against one process: outputs and all gradients, float64.

Each rank computes its shard and its partial gradients; outputs and input gradients are laid end to end, parameter
gradients are added up. A family that is added to the registry is tested here without another line.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.parallel import CommunicationLedger, SequenceShard, Strategies
from tests.distributed import run_ranks

from .cases import MIXER_CASES, MODEL_CASES, SMALL, WIDTH, difference, make_mixer, make_model, numbers

TOLERANCE = 1e-12
BATCH = 2

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """Offsets of the shards, and documents: for all rows, or for each row of the batch."""

    bounds: tuple[int, ...]
    documents: Any = None

    @property
    def length(self) -> int:
        return self.bounds[-1]

    @property
    def size(self) -> int:
        return len(self.bounds) - 1

    def shard(self, group: dist.ProcessGroup | None, **options: Any) -> SequenceShard:
        return SequenceShard.split(self.length, group, self.documents, bounds=self.bounds, **options)


SPLITS = {
    "two": Split((0, 12, 24)),
    "two, uneven": Split((0, 5, 24)),
    "three, uneven": Split((0, 11, 13, 24)),
    "four, shorter than the halo": Split((0, 1, 2, 3, 17)),
    "four, one token each": Split((0, 1, 2, 3, 4)),
    "two, document at the boundary": Split((0, 12, 24), [12]),
    "two, documents beside the boundary": Split((0, 12, 24), [11, 13]),
    "three, document ends in the halo": Split((0, 8, 16, 24), [7, 14, 23]),
    "three, one document over all of them": Split((0, 8, 16, 24), [2, 22]),
    "four, documents of one token": Split((0, 6, 7, 9, 20), [5, 6, 7, 8, 9, 10]),
    "four, rows differ": Split((0, 5, 10, 15, 20), [[3, 10, 19], [12]]),
    "four, one row is one document": Split((0, 5, 10, 15, 20), [[], [5, 15]]),
}


def mixer_result(name: str, split: Split, shard: SequenceShard) -> Result:
    mixer = make_mixer(name)
    here = slice(shard.start, shard.stop)
    x_BTD = numbers("x", BATCH, split.length, WIDTH)[:, here].clone().requires_grad_()
    y_BTD = mixer(x_BTD, shard)
    (y_BTD * numbers("w", BATCH, split.length, WIDTH)[:, here]).sum().backward()
    assert x_BTD.grad is not None
    return {"local output": y_BTD.detach(), "local input gradient": x_BTD.grad, **gradients(mixer)}


def model_result(name: str, split: Split, shard: SequenceShard) -> Result:
    model = make_model(MODEL_CASES[name])
    generator = torch.Generator().manual_seed(0)
    here = slice(shard.start, shard.stop)
    tokens_BT, targets_BT = torch.randint(SMALL["vocab_size"], (2, BATCH, split.length), generator=generator)
    targets_BT[0, 1:3] = -100  # shards hold different numbers of valid targets
    losses = model(tokens_BT[:, here], targets_BT[:, here], shard)
    losses.total.backward()
    with torch.no_grad():
        logits_BTV = model.logits(tokens_BT[:, here], shard)
    return {"local logits": logits_BTV, "loss": torch.stack(losses).detach(), **gradients(model)}


def gradients(module: torch.nn.Module) -> Result:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


COMPUTE = {"mixer": mixer_result, "model": model_result}


def all_results(rank: int, world_size: int, kind: str, names: list[str], splits: list[Split]) -> list[Result]:
    """On every rank, each case with each split."""
    group = dist.group.WORLD
    results = []
    for split in splits:
        shard = split.shard(group)
        results += [COMPUTE[kind](name, split, shard) for name in names]
    return results


FORMS = [
    Strategies(prefix="logarithmic", attention="ring", convolution="length"),
    Strategies(prefix="pipelined", attention="grid", convolution="length"),
    Strategies(prefix="hierarchical", attention="gather", convolution="channels"),
]


def changed_by_forms(ledger: CommunicationLedger) -> bool:
    """Whether a layer that made these motions would make others in another form."""
    motions = {motion.split(".")[0] for motion in ledger.by_motion()}
    return bool(motions & {"prefix_state", "heads", "ring", "relayout", "reshard", "convolve"})


def assembled(parts: list[Result]) -> Result:
    """Local values end to end, replicated ones checked, gradients added up."""
    whole: Result = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if key.startswith("local"):
            whole[key] = torch.cat(values, dim=1)
        elif key == "loss":
            assert all(torch.equal(value, values[0]) for value in values)
            whole[key] = values[0]
        else:
            whole[key] = torch.stack(values).sum(dim=0)
    return whole


def worst(ours: Result, expected: Result) -> tuple[float, str]:
    assert ours.keys() == expected.keys()
    return max((difference(ours[key], expected[key]), key) for key in expected)


def expected_result(kind: str, name: str, split: Split) -> Result:
    return COMPUTE[kind](name, split, SequenceShard.whole(split.length, split.documents))


@pytest.mark.parametrize("kind", ["mixer", "model"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_split_equals_whole(kind: str, world_size: int) -> None:
    names = list(MIXER_CASES if kind == "mixer" else MODEL_CASES)
    chosen = {label: split for label, split in SPLITS.items() if split.size == world_size}
    by_rank = run_ranks(all_results, world_size, kind, names, list(chosen.values()))
    cases = [(label, split, name) for label, split in chosen.items() for name in names]
    for (label, split, name), parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        error, key = worst(assembled(list(parts)), expected_result(kind, name, split))
        assert error < TOLERANCE, f"{name}; {label}: {key} differs by {error:.1e}"


@pytest.mark.parametrize("name", MIXER_CASES)
def test_shards_that_do_not_speak_differ(name: str) -> None:
    split = SPLITS["three, uneven"]
    parts = []
    for start, stop in pairwise(split.bounds):
        mixer = make_mixer(name)
        x_BTD = numbers("x", BATCH, split.length, WIDTH)[:, start:stop]
        parts.append(mixer(x_BTD, SequenceShard.whole(stop - start)))
    whole_BTD = expected_result("mixer", name, split)["local output"]
    assert difference(torch.cat(parts, dim=1), whole_BTD) > 1e-3


def spread_results(rank: int, world_size: int, names: list[str], split: Split) -> dict[str, Result]:
    """Sequences split in pairs of processes, two pairs with a row of the batch each."""
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    shard = split.shard(pairs[rank // 2], token_group=dist.group.WORLD)
    row = rank // 2
    results = {}
    for name in names:
        model = make_model(MODEL_CASES[name])
        generator = torch.Generator().manual_seed(0)
        here = slice(shard.start, shard.stop)
        tokens_BT, targets_BT = torch.randint(SMALL["vocab_size"], (2, BATCH, split.length), generator=generator)
        targets_BT[0, 1:3] = -100
        losses = model(tokens_BT[row : row + 1, here], targets_BT[row : row + 1, here], shard)
        losses.total.backward()
        results[name] = {"loss": torch.stack(losses).detach(), **gradients(model)}
    return results


def test_batch_and_sequence_split_together_equal_whole() -> None:
    split = Split((0, 9, 20), [4, 12])
    by_rank = run_ranks(spread_results, 4, list(MODEL_CASES), split)
    for name in MODEL_CASES:
        expected = expected_result("model", name, split)
        del expected["local logits"]
        error, key = worst(assembled([part[name] for part in by_rank]), expected)
        assert error < TOLERANCE, f"{name}: {key} differs by {error:.1e}"
