"""Batches of no rows: every mixer has no outputs for them, zeros as gradients, and decodes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.models.mixers import Mixer
from longstride.models.registry import MIXERS
from longstride.parallel import SequenceShard, Strategies
from tests.distributed import run_ranks

from .cases import MIXER_CASES, MODEL_CASES, WIDTH, make_mixer, make_model, numbers

LENGTH = 13
FORMS = [Strategies(), Strategies(attention="ring", convolution="length"), Strategies(attention="gather")]
OTHERWISE_SPLIT = ("attention", "gau", "hyena")
Gradients = dict[str, Tensor | None]


def gradients(mixer: Mixer, rows: int, shard: SequenceShard) -> Gradients:
    """Of the input and every parameter."""
    here = slice(shard.start, shard.stop)
    x_BTD = numbers("x", rows, LENGTH, WIDTH)[:, here].to(next(mixer.parameters()).dtype).requires_grad_()
    y_BTD = mixer(x_BTD, shard)
    assert y_BTD.shape == x_BTD.shape
    (y_BTD * numbers("w", rows, LENGTH, WIDTH)[:, here]).sum().backward()
    return {"input": x_BTD.grad, **{name: parameter.grad for name, parameter in mixer.named_parameters()}}


def all_zero(found: Gradients) -> bool:
    """None is not zero: a sharded parameter without a gradient would send nothing to processes that await it."""
    return all(grad is not None and not grad.any() for grad in found.values())


def prefill(mixer: Mixer, shard: SequenceShard) -> None:
    dtype = next(mixer.parameters()).dtype
    x_BTD = torch.zeros(0, shard.local_length, WIDTH, dtype=dtype)
    state = mixer.init_state(0, x_BTD.device, dtype)
    for _ in range(2):
        y_BTD, state = mixer.prefill(x_BTD, shard, state)
        assert y_BTD.shape == x_BTD.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MIXER_CASES)
def test_on_one_process(name: str, dtype: torch.dtype) -> None:
    mixer = make_mixer(name).to(dtype)
    for documents in (None, (4, 7), ()):
        assert all_zero(gradients(mixer, 0, SequenceShard.whole(LENGTH, documents)))
    with torch.no_grad():
        prefill(mixer, SequenceShard.whole(LENGTH))
        state = mixer.init_state(0, torch.device("cpu"), dtype)
        for _ in range(2):
            y_BD, state = mixer.step(torch.zeros(0, WIDTH, dtype=dtype), state)
            assert y_BD.shape == (0, WIDTH)


def split(rank: int, world_size: int) -> None:
    for form, strategies in enumerate(FORMS):
        for name in MIXERS if form == 0 else OTHERWISE_SPLIT:
            mixer, whole = make_mixer(name), SequenceShard.split(LENGTH, dist.group.WORLD, strategies=strategies)
            packed = SequenceShard.split(LENGTH, dist.group.WORLD, (4, 7), strategies=strategies)
            assert all_zero(gradients(mixer, 0, packed)), name
            with torch.no_grad():
                prefill(mixer, whole)


def test_split() -> None:
    run_ranks(split, 2)


@pytest.mark.parametrize("name", MODEL_CASES)
def test_whole_models(name: str) -> None:
    model, tokens_BT = make_model(MODEL_CASES[name]), torch.zeros(0, LENGTH, dtype=torch.int64)
    loss = model.loss(tokens_BT, tokens_BT)
    loss.backward()
    assert loss == 0 and all_zero({name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("name", MIXER_CASES)
def test_negative_control_a_row_has_gradients(name: str) -> None:
    assert not all_zero(gradients(make_mixer(name), 1, SequenceShard.whole(LENGTH)))
