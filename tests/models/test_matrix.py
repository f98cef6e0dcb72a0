"""The table of exactness: every registered mixer x 1..8 processes x awkward lengths and documents, and whole models.

Shapes are drawn by hypothesis, so that nobody chose the convenient ones. `make test` runs a few draws, `make
test-full` many (docs/exactness.md holds its result, noted by `exactness`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from longstride.models import LanguageModel, ModelConfig, build_model, initialise
from longstride.parallel import Mesh, SequenceShard, Strategies, clip_gradients, shard_model
from tests.distributed import run_ranks

from .cases import MIXER_CASES, MODEL_CASES, WIDTH, difference, make_mixer, numbers
from .exactness import Errors, larger, note
from .test_split import BATCH, COMPUTE, TOLERANCE, Result, Split, assembled, expected_result, gradients, worst

DRAWN = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes and say little more
    derandomize=True,
)


@st.composite
def splits(draw: st.DrawFn, world_size: int) -> Split:
    """Shards of any sizes from one token up, and documents anywhere, at and beside the boundaries above all."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=world_size, max_size=world_size))
    bounds = tuple(sum(sizes[:i]) for i in range(world_size + 1))
    length = bounds[-1]
    near = sorted({p for b in bounds for p in (b - 1, b, b + 1) if 0 < p < length})
    position = st.integers(1, max(1, length - 1))
    somewhere = st.one_of(st.sampled_from(near), position) if near else position
    row = st.lists(somewhere, max_size=5)
    documents = draw(st.one_of(st.none(), row, st.lists(row, min_size=BATCH, max_size=BATCH)))
    return Split(bounds, documents if length > 1 else None)


def matrix_results(
    rank: int, world_size: int, kind: str, names: list[str], drawn: list[Split], strategies: Strategies
) -> list[Result]:
    group = dist.group.WORLD
    shards = [split.shard(group, strategies=strategies) for split in drawn]
    return [COMPUTE[kind](name, s, shard) for s, shard in zip(drawn, shards, strict=True) for name in names]


def check(kind: str, world_size: int, drawn: list[Split], strategies: Strategies = Strategies()) -> Errors:  # noqa: B008 - frozen
    """The largest relative error of each case, below the tolerance."""
    names = list(MIXER_CASES if kind == "mixer" else MODEL_CASES)
    by_rank = run_ranks(matrix_results, world_size, kind, names, drawn, strategies, timeout=1200)
    cases = [(split, name) for split in drawn for name in names]
    errors: Errors = {}
    for (split, name), parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        error, key = worst(assembled(list(parts)), expected_result(kind, name, split))
        assert error < TOLERANCE, f"{name}; {split}: {key} differs by {error:.1e}"
        larger(errors, name, error)
    return errors


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_drawn_splits_equal_whole(world_size: int) -> None:
    @settings(DRAWN, max_examples=1)
    @given(st.lists(splits(world_size), min_size=3, max_size=3))
    def run(drawn: list[Split]) -> None:
        check("mixer", world_size, drawn)

    run()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["mixer", "model"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_many_drawn_splits_equal_whole(world_size: int, kind: str) -> None:
    errors: Errors = {}

    @settings(DRAWN, max_examples=5)
    @given(st.lists(splits(world_size), min_size=8, max_size=8))
    def run(drawn: list[Split]) -> None:
        for name, error in check(kind, world_size, drawn).items():
            larger(errors, name, error)

    run()
    note(kind, str(world_size), errors)


FORMS = [
    Strategies(prefix="logarithmic", attention="ring", convolution="length"),
    Strategies(prefix="pipelined", attention="grid", convolution="length"),
    Strategies(prefix="all_gather", attention="gather", convolution="channels"),
]


@pytest.mark.parametrize("strategies", FORMS, ids=lambda s: f"{s.prefix}-{s.attention}-{s.convolution}")
def test_every_form_of_travel_equals_whole(strategies: Strategies) -> None:
    drawn = [Split((0, 7, 12, 20, 26), [[3, 12, 25], [13]]), Split((0, 6, 12, 18, 24))]
    check("mixer", 4, drawn, strategies)
    check("model", 4, drawn[:1], strategies)


def single_precision(rank: int, world_size: int, names: list[str], split: Split) -> list[Result]:
    shard = split.shard(dist.group.WORLD)
    return [float32_result(name, split, shard) for name in names]


def float32_result(name: str, split: Split, shard: SequenceShard) -> Result:
    mixer = make_mixer(name).float()
    here = slice(shard.start, shard.stop)
    x_BTD = numbers("x", BATCH, split.length, WIDTH)[:, here].float().requires_grad_()
    y_BTD = mixer(x_BTD, shard)
    (y_BTD * numbers("w", BATCH, split.length, WIDTH)[:, here].float()).sum().backward()
    assert x_BTD.grad is not None
    return {"local output": y_BTD.detach(), "local input gradient": x_BTD.grad, **gradients(mixer)}


def test_float32_is_no_worse_than_on_one_process() -> None:
    """Root mean square errors against the float64 oracle, over all tensors of a mixer: at most 1.5 times as large."""
    split, names = Split((0, 17, 31, 44, 63), [20, 44]), list(MIXER_CASES)
    by_rank, ratios = run_ranks(single_precision, 4, names, split), {}
    for name, parts in zip(names, zip(*by_rank, strict=True), strict=True):
        oracle = expected_result("mixer", name, split)
        alone = float32_result(name, split, SequenceShard.whole(split.length, split.documents))
        ours = assembled(list(parts))
        errors = {key: (rms(ours[key], oracle[key]), rms(alone[key], oracle[key])) for key in oracle}
        total = [sum(pair[i] ** 2 for pair in errors.values()) ** 0.5 for i in (0, 1)]
        assert total[0] <= 1.5 * total[1], f"{name}: {total[0]:.1e} split, {total[1]:.1e} on one process; {errors}"
        ratios[name] = total[0] / total[1]
    note("float32", "ratio", ratios)


def rms(ours: Tensor, oracle: Tensor) -> float:
    """Root mean square error relative to the root mean square of the oracle."""
    scale = oracle.square().mean().sqrt().clamp(min=1e-30)
    return float((ours.double() - oracle).square().mean().sqrt() / scale)


def influences(rank: int, world_size: int, names: list[str], split: Split, positions: list[int]) -> list[Tensor]:
    """Per mixer and position: how the output there depends on this rank's inputs, (positions, B, T)."""
    shard = split.shard(dist.group.WORLD)
    results = []
    for name in names:
        mixer = make_mixer(name)
        x_BTD = numbers("x", BATCH, split.length, WIDTH)[:, shard.start : shard.stop].clone().requires_grad_()
        y_BTD = mixer(x_BTD, shard)
        rows = []
        for position in positions:
            weight = torch.zeros_like(y_BTD)
            if shard.start <= position < shard.stop:
                weight[:, position - shard.start] = numbers("w", WIDTH)
            x_BTD.grad = None
            y_BTD.backward(weight, retain_graph=True)  # all of the graph: pruned ranks would not answer the others
            assert x_BTD.grad is not None
            rows.append(x_BTD.grad.abs().amax(-1))
        results.append(torch.stack(rows))
    return results


def test_no_output_depends_on_a_later_token_or_another_document() -> None:
    split, positions = Split((0, 5, 11, 17), [[7], []]), [0, 4, 5, 8, 16]
    names = list(MIXER_CASES)
    by_rank = run_ranks(influences, 3, names, split, positions)
    for name, parts in zip(names, zip(*by_rank, strict=True), strict=True):
        influence = torch.cat(parts, dim=2)
        for row, position in zip(influence, positions, strict=True):
            # a transform spreads rounding over all tokens: "nothing" is rounding of the largest influence
            nothing = 1e-13 * float(row.max())
            assert _largest(row[:, position + 1 :]) <= nothing, f"{name} sees the future"
            assert float(row[:, position].min()) > nothing, f"{name} does not see its own token"
            if position >= 7:
                assert _largest(row[0, :7]) <= nothing, f"{name} sees another document"


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "width": 16,
    "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4, kv_heads=2), mamba+moe(balance=bias, shared=1)]",
    "moe": {"experts": 4, "hidden": 16, "balance_loss": 0.3, "z_loss": 0.1, "bias_speed": 0.01},
    "init_std": 0.2,
}
LENGTH, ROWS = 24, 4


def three_steps(rank: int, world_size: int, degrees: dict[str, int]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and parameters and buffers after three optimiser steps."""
    mesh = Mesh(**degrees)
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.parse(CONFIG)).double()
    shard_model(model, mesh, blocks=list(model.blocks), experts=model.expert_modules())
    model.to_empty(device="cpu")
    initialise(model, seed=5)
    return train(model, mesh, mesh.shard(LENGTH, [5, 13]))


def train(model: LanguageModel, mesh: Mesh | None, shard: SequenceShard) -> tuple[list[float], dict[str, Tensor]]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    data_rank, data_size = (mesh.data_rank, mesh.data_size) if mesh else (0, 1)
    rows = slice(data_rank * ROWS // data_size, (data_rank + 1) * ROWS // data_size)
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        tokens, targets = torch.randint(48, (2, ROWS, LENGTH), generator=generator)[:, rows, shard.start : shard.stop]
        loss = model(tokens, targets, shard).total
        loss.backward()
        clip_gradients(model.parameters(), 1.0, mesh)
        optimiser.step()
        model.end_step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    state = model.state_dict()
    return losses, {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in state.items()}


DEGREES = [
    {"sequence": 8, "expert": 4},
    {"data": 2, "sequence": 4, "expert": 4},
    {"data": 4, "sequence": 2, "expert": 2},
    {"replicate": 2, "sequence": 4, "expert": 2},
    {"replicate": 2, "data": 2, "sequence": 2, "expert": 4},
]


@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()))
def test_whole_models_train_alike_on_eight_processes(degrees: dict[str, int]) -> None:
    expected = train(build_model(CONFIG, seed=5, dtype=torch.float64), None, SequenceShard.whole(LENGTH, [5, 13]))
    assert expected[1]["blocks.3.feed_forward.selection_bias"].abs().max() > 0.005
    worst_loss = worst_parameter = 0.0
    for losses, parameters in run_ranks(three_steps, 8, degrees):
        assert losses == pytest.approx(expected[0], rel=1e-12)
        relative = [abs(ours / theirs - 1) for ours, theirs in zip(losses, expected[0], strict=True)]
        worst_loss = max(worst_loss, *relative)
        for name, parameter in expected[1].items():
            error = difference(parameters[name], parameter)
            assert error < 1e-10, name
            worst_parameter = max(worst_parameter, error)
    label = ", ".join(f"{axis} {degree}" for axis, degree in degrees.items())
    note("training", label, {"losses": worst_loss, "parameters and buffers": worst_parameter})
