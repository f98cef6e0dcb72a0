"""CPU-sized models learn, every preset and what none holds: a few steps on two processes that share each sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from longstride.models import build_model, list_presets
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

PRESETS = [name for name in list_presets() if name.endswith("-small")]
# of Conba's variants only `exact` has no preset
EXACT = {"vocab_size": 64, "width": 32, "layers": "[conba(variant=exact, state=8)] x 2"}
LENGTH, BATCH, STEPS, DOCUMENTS = 64, 2, 16, [23, 40]


def losses(rank: int, world: int, name: str | dict[str, Any]) -> list[float]:
    """Of every step, on sequences in which each token decides the next."""
    torch.set_num_threads(1)
    shard = SequenceShard.split(LENGTH, dist.group.WORLD, DOCUMENTS)
    model = build_model(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(STEPS):
        first_B1 = torch.randint(64, (BATCH, 1), generator=generator)
        whole_BL = (first_B1 + 5 * torch.arange(LENGTH + 1)) % 64
        here = slice(shard.start, shard.stop)
        result = model(whole_BL[:, :-1][:, here], whole_BL[:, 1:][:, here], shard)
        result.total.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        model.end_step()
        seen.append(result.cross_entropy.item())
    return seen


@pytest.mark.parametrize("name", [*PRESETS, pytest.param(EXACT, id="conba, exact")])
def test_the_loss_falls_on_two_processes(name: str | dict[str, Any]) -> None:
    first, second = run_ranks(losses, 2, name)
    assert first == second
    assert min(first[-3:]) < 0.8 * first[0], first
