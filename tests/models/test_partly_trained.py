"""Layers of which only some parameters ask for gradients, and whose input asks for none: split against whole.

What asks decides which gradients cross between processes, and every process must come to the same answer.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist

from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import MIXER_CASES, MODEL_CASES, SMALL, WIDTH, make_mixer, make_model, numbers
from .test_split import BATCH, SPLITS, TOLERANCE, Result, assembled, gradients, worst

SPLIT = SPLITS["three, uneven"]
CASES = [*product(MIXER_CASES, (0, 1))]


def ask(module: torch.nn.Module, half: int) -> None:
    """Of every other parameter."""
    for place, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(place % 2 == half)


def mixer_result(name: str, half: int, shard: SequenceShard) -> Result:
    mixer = make_mixer(name)
    ask(mixer, half)
    here = slice(shard.start, shard.stop)
    x_BTD = numbers("x", BATCH, SPLIT.length, WIDTH)[:, here]
    y_BTD = mixer(x_BTD, shard)
    (y_BTD * numbers("w", BATCH, SPLIT.length, WIDTH)[:, here]).sum().backward()
    assert all(parameter.requires_grad or parameter.grad is None for parameter in mixer.parameters())
    return {"local output": y_BTD.detach(), **gradients(mixer)}


def model_result(name: str, half: int, first: int, shard: SequenceShard) -> Result:
    """Nothing is asked of what comes before block `first`."""
    model = make_model(MODEL_CASES[name])
    ask(model, half)
    for part in (model.embedding, *model.blocks[:first]):
        part.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(SMALL["vocab_size"], (BATCH, SPLIT.length), generator=generator)
    here = tokens_BT[:, shard.start : shard.stop]
    loss = model.loss(here, here, shard)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def on_every_rank(rank: int, world_size: int) -> list[Result]:
    shard = SPLIT.shard(dist.group.WORLD)
    of_mixers = [mixer_result(*case, shard) for case in CASES]
    return of_mixers + [model_result(name, half, 1 + half, shard) for name in MODEL_CASES for half in (0, 1)]


def test_split_equals_whole() -> None:
    whole = SequenceShard.whole(SPLIT.length)
    expected = [mixer_result(*case, whole) for case in CASES]
    expected += [model_result(name, half, 1 + half, whole) for name in MODEL_CASES for half in (0, 1)]
    names = [str(case) for case in (*CASES, *product(MODEL_CASES, (0, 1)))]
    for name, whole_result, parts in zip(names, expected, zip(*run_ranks(on_every_rank, 3), strict=True), strict=True):
        error, key = worst(assembled(list(parts)), whole_result)
        assert error < TOLERANCE, f"{name}: {key} differs by {error:.1e}"
