"""float32 on several processes is no worse than on one, judged against the float64 oracle of one process.

Outputs, input gradients and parameter gradients each have a bound of their own, so that a bad gradient cannot hide
behind the rest. A gradient that is one number over a long sum may by luck be nearly right on one process: the median
over several inputs is compared, not a single one.
"""

from __future__ import annotations

from statistics import median

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longstride.models.registry import MIXERS
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

from .cases import MIXER_CASES, WIDTH, make_mixer, numbers
from .exactness import GroupErrors, grouped, note
from .test_split import BATCH, Result, Split, assembled, gradients

SPLITS = {
    2: Split((0, 29, 63), [[20, 44], []]),
    8: Split((0, 9, 17, 22, 31, 40, 44, 55, 63), [[20, 44], []]),
}
BOUND, BOUND_OF_A_TENSOR = 1.5, 2.5


def result(name: str, split: Split, shard: SequenceShard, number: int, dtype: torch.dtype) -> Result:
    mixer = make_mixer(name).to(dtype)
    here = slice(shard.start, shard.stop)
    x_BTD, w_BTD = (numbers(f"{x} {number}", BATCH, split.length, WIDTH)[:, here].to(dtype) for x in "xw")
    y_BTD = mixer(x_BTD.requires_grad_(), shard)
    (y_BTD * w_BTD).sum().backward()
    assert x_BTD.grad is not None
    return {"local output": y_BTD.detach(), "local input gradient": x_BTD.grad, **gradients(mixer)}


def split_results(rank: int, world_size: int, names: list[str], split: Split, inputs: int) -> list[list[Result]]:
    shard = split.shard(dist.group.WORLD)
    return [[result(name, split, shard, number, torch.float32) for number in range(inputs)] for name in names]


def rms(ours: Tensor, oracle: Tensor) -> float:
    """Root mean square error relative to the root mean square of the oracle."""
    scale = oracle.square().mean().sqrt().clamp(min=1e-30)
    return float((ours.double() - oracle).square().mean().sqrt() / scale)


def ratios(name: str, split: Split, parts: list[Result], number: int) -> tuple[dict[str, float], dict[str, float]]:
    """The error of several processes over that of one, by tensor and by group (sums of squares over tensors)."""
    whole = SequenceShard.whole(split.length, split.documents)
    oracle = result(name, split, whole, number, torch.float64)
    alone = result(name, split, whole, number, torch.float32)
    ours = assembled(parts)
    errors = [{key: rms(found[key], oracle[key]) ** 2 for key in oracle} for found in (ours, alone)]
    groups = [grouped(squares, lambda a, b: a + b) for squares in errors]
    by_tensor, by_group = ({key: (a[key] / b[key]) ** 0.5 for key in a if b[key]} for a, b in (errors, groups))
    return by_tensor, by_group


def check(world_size: int, names: list[str], inputs: int) -> GroupErrors:
    """The median ratios of every group, below their bounds."""
    split, found = SPLITS[world_size], GroupErrors()
    by_rank = run_ranks(split_results, world_size, names, split, inputs, timeout=600)
    for name, by_number in zip(names, zip(*by_rank, strict=True), strict=True):
        measured = [
            ratios(name, split, list(parts), number) for number, parts in enumerate(zip(*by_number, strict=True))
        ]
        tensors, groups = ({key: median(m[i][key] for m in measured) for key in measured[0][i]} for i in (0, 1))
        assert max(groups.values()) <= BOUND, f"{name} on {world_size} processes: {groups}"
        assert max(tensors.values()) <= BOUND_OF_A_TENSOR, f"{name} on {world_size} processes: {tensors}"
        found[name] = groups
    return found


def test_every_layer_on_two_processes() -> None:
    check(2, list(MIXER_CASES), inputs=3)


def test_every_family_on_eight_processes() -> None:
    check(8, list(MIXERS), inputs=3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 8])
def test_every_layer_over_more_inputs(world_size: int) -> None:
    note("float32", str(world_size), check(world_size, list(MIXER_CASES), inputs=7))


def test_negative_control_one_bad_gradient_does_not_hide() -> None:
    """An error in a single small gradient is above its own bound, though all tensors together stay below theirs."""
    split = SPLITS[2]
    parts = [result("mamba", split, SequenceShard.whole(split.length, split.documents), 0, torch.float32)]
    parts[0]["D"] *= 1 + 1e-6
    by_tensor, _ = ratios("mamba", split, parts, 0)
    assert by_tensor["D"] > BOUND_OF_A_TENSOR
    assert max(ratio for key, ratio in by_tensor.items() if key != "D") == 1.0
