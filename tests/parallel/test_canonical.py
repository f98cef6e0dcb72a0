"""The canonical mode: losses and every gradient bitwise the same for sequence degrees 1, 2 and 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from longstride.models import build_model
from longstride.models.registry import MIXERS
from longstride.parallel import CanonicalModel, CommunicationLedger, SequenceShard
from longstride.parallel.shard import even_bounds
from tests.distributed import run_ranks
from tests.models.cases import MIXER_CASES, SMALL

CONFIGS = Path(__file__).parent.parent.parent / "configs"
LENGTH, TILES = 64, 8
HYBRID: dict[str, Any] = {
    "vocab_size": 40,
    "width": 16,
    "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4, kv_heads=2), mamba+moe]",
    "moe": {"experts": 4, "hidden": 24, "balance_loss": 0.3, "z_loss": 0.1},
    "init_std": 0.2,
}


def config_of(name: str) -> dict[str, Any]:
    if name == "quickstart":
        return yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]
    return HYBRID if name == "hybrid" else {**SMALL, "vocab_size": 40, **MIXER_CASES[name]}


def compute(rank: int, world: int, configs: list[dict[str, Any]], canonical: bool) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients of each model, float32, in which every rounding shows."""
    group = dist.group.WORLD if world > 1 else None
    bounds = even_bounds(LENGTH, world)
    here = slice(bounds[rank], bounds[rank + 1])
    tokens, targets = torch.randint(40, (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    results = []
    for config in configs:
        model = build_model(config, seed=1)
        documents, ledger = [[7, 30], [16]], CommunicationLedger()
        if canonical:
            runner = CanonicalModel(model, TILES, group)
            losses = runner.run(backward, tokens[:, here], targets[:, here], LENGTH, documents, ledger)
            runner.collect_gradients()
        else:
            shard = SequenceShard.split(LENGTH, group, documents) if group else SequenceShard.whole(LENGTH, documents)
            losses = backward(model, tokens[:, here], targets[:, here], shard)
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        grads = [p.grad for p in model.parameters()]
        results.append((losses, [g for g in grads if g is not None]))
    return results


def backward(model: Any, tokens: Tensor, targets: Tensor, shard: SequenceShard) -> Tensor:
    losses = model(tokens, targets, shard)
    losses.total.backward()
    return torch.stack(losses).detach()


NAMES = [*MIXERS, "hybrid", "quickstart"]
CONFIGURATIONS = [config_of(name) for name in NAMES]


@pytest.fixture(scope="module")
def alone() -> list[tuple[Tensor, list[Tensor]]]:
    return run_ranks(compute, 1, CONFIGURATIONS, True)[0]


@pytest.mark.parametrize("world", [2, 4])
def test_bitwise_for_every_sequence_degree(world: int, alone: list[tuple[Tensor, list[Tensor]]]) -> None:
    for results in run_ranks(compute, world, CONFIGURATIONS, True):
        for name, (losses, grads), (true_losses, true_grads) in zip(NAMES, results, alone, strict=True):
            assert torch.equal(losses, true_losses), name
            assert len(grads) == len(true_grads)
            assert all(torch.equal(a, b) for a, b in zip(grads, true_grads, strict=True)), name


ADAPTING: dict[str, Any] = {
    **HYBRID,
    "layers": "[conba(state=4, online_rate=0.1)+moe(balance=bias, bias_speed=0.01), mamba+moe(balance=bias)]",
}


def adapt(rank: int, world: int) -> list[Tensor]:
    """What layers adapt by other means than gradients, after three steps."""
    group = dist.group.WORLD if world > 1 else None
    bounds = even_bounds(LENGTH, world)
    here = slice(bounds[rank], bounds[rank + 1])
    model = build_model(ADAPTING, seed=1)
    runner = CanonicalModel(model, TILES, group)
    for step in range(3):
        tokens, targets = torch.randint(40, (2, 2, LENGTH), generator=torch.Generator().manual_seed(step))
        runner.run(backward, tokens[:, here], targets[:, here], LENGTH, [[7, 30], [16]], CommunicationLedger())
        runner.collect_gradients()
        runner.end_step()
    return [buffer.clone() for buffer in model.buffers()]


def test_what_layers_adapt_is_bitwise_equal_too() -> None:
    expected = run_ranks(adapt, 1)[0]
    assert len(expected) == 3 and all(buffer.abs().max() > 0 for buffer in expected)
    for buffers in run_ranks(adapt, 2):
        assert all(torch.equal(a, b) for a, b in zip(buffers, expected, strict=True))
    model = build_model(ADAPTING, seed=1)
    for step in range(3):
        tokens, targets = torch.randint(40, (2, 2, LENGTH), generator=torch.Generator().manual_seed(step))
        backward(model, tokens, targets, SequenceShard.whole(LENGTH, [[7, 30], [16]]))
        model.end_step()
    for ours, ordinary in zip(expected, model.buffers(), strict=True):
        assert torch.allclose(ours, ordinary, rtol=1e-4, atol=1e-7)


def test_negative_control_the_ordinary_mode_rounds_differently() -> None:
    expected = run_ranks(compute, 1, [HYBRID], False)[0]
    results = run_ranks(compute, 2, [HYBRID], False)[0]
    pairs = zip(results[0][1], expected[0][1], strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_it_is_the_same_mathematics() -> None:
    model = build_model(HYBRID, seed=1)
    tokens, targets = torch.randint(40, (2, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    losses = backward(model, tokens, targets, SequenceShard.whole(LENGTH, [[7, 30], [16]]))
    canonical = run_ranks(compute, 1, [HYBRID], True)[0][0]
    assert torch.allclose(losses, canonical[0], rtol=1e-5)
    for parameter, grad in zip(model.parameters(), canonical[1], strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - grad).abs().max()) <= 1e-4 * float(parameter.grad.abs().max()) + 1e-7


def test_tiles_must_divide() -> None:
    with pytest.raises(AssertionError, match="8 tiles cannot be spread over 3 processes evenly"):
        run_ranks(compute, 3, [HYBRID], True)


def test_tiles_differentiate_on_threads_of_their_own() -> None:
    """A GPU has one thread for all backward passes: the first tile would keep it and wait for the others for ever."""
    runner, ledger = CanonicalModel(build_model(HYBRID), TILES, None), CommunicationLedger()
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)

    def on_its_own(*_: Any) -> bool:
        return not torch._C._is_multithreading_enabled()

    assert runner.run(on_its_own, tokens, tokens, LENGTH, None, ledger)
    assert torch._C._is_multithreading_enabled()
