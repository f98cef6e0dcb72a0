"""Every small preset learns: trained on two processes, each with half of every sequence, its loss falls."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from longstride.models import build_model
from longstride.parallel import SequenceShard
from tests.distributed import run_ranks

FAMILIES = ["linear-attention", "s4d", "s4", "h3", "mamba2", "retnet", "striped-hyena", "striped-hyena-2"]
LENGTH, STEPS = 48, 12


def train(rank: int, world_size: int, preset: str) -> list[float]:
    """Losses, one a step, on sequences that count upwards from anywhere."""
    model = build_model(preset, seed=1)
    shard = SequenceShard.split(LENGTH, dist.group.WORLD)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        first_B1 = torch.randint(64, (4, 1), generator=generator)
        tokens_BT = (first_B1 + torch.arange(LENGTH + 1)) % 64
        here = slice(shard.start, shard.stop)
        loss = model.loss(tokens_BT[:, :-1][:, here], tokens_BT[:, 1:][:, here], shard)
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_on_two_processes(family: str) -> None:
    first, second = run_ranks(train, 2, f"{family}-small")
    assert first == second
    assert abs(first[0] - 5.545) < 0.1  # knows nothing of 256 bytes
    assert first[-1] < first[0] - 1
