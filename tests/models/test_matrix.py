"""The table of exactness: every registered mixer x 1..8 processes x awkward lengths and documents, and whole models.

Shapes are drawn by hypothesis, so that nobody chose the convenient ones; only uneven shards are kept, and every kind
of documents has its turn. `make test` runs a few draws, `make test-full` many (docs/exactness.md holds its result,
noted by `exactness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from longstride.models import LanguageModel, ModelConfig, build_model, initialise
from longstride.parallel import CommunicationLedger, Mesh, SequenceShard, clip_gradients, shard_model
from tests.distributed import run_ranks

from .cases import MIXER_CASES, MODEL_CASES, difference
from .exactness import GroupErrors, grouped, larger, note
from .test_split import (
    BATCH,
    COMPUTE,
    FORMS,
    TOLERANCE,
    Result,
    Split,
    assembled,
    changed_by_forms,
    expected_result,
    mixer_result,
    worst,
)

DRAWN = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes and say little more
    derandomize=True,
)


KINDS_OF_DOCUMENTS = ("none", "the same in all rows", "a row's own")


@st.composite
def splits(draw: st.DrawFn, world_size: int, documents: str) -> Split:
    """Shards of different sizes from one token up, and documents anywhere, at and beside the boundaries above all."""
    sizes = st.lists(st.integers(1, 9), min_size=world_size, max_size=world_size)
    uneven = draw(sizes.filter(lambda sizes: len(set(sizes)) > 1 or (world_size == 1 and sizes[0] > 1)))
    bounds = tuple(sum(uneven[:i]) for i in range(world_size + 1))
    length = bounds[-1]
    near = sorted({p for b in bounds for p in (b - 1, b, b + 1) if 0 < p < length})
    row = st.lists(st.one_of(st.sampled_from(near), st.integers(1, length - 1)), max_size=5)
    if documents == "none":
        return Split(bounds)
    if documents == "the same in all rows":
        return Split(bounds, draw(row.filter(bool)))
    return Split(bounds, draw(st.lists(row, min_size=BATCH, max_size=BATCH).filter(lambda rows: rows[0] != rows[1])))


def awkward(world_size: int, number: int) -> st.SearchStrategy[tuple[Split, ...]]:
    """`number` splits, of which every third has documents of the same kind."""
    return st.tuples(*(splits(world_size, KINDS_OF_DOCUMENTS[i % 3]) for i in range(number)))


def assert_awkward(drawn: list[Split]) -> None:
    """Hypothesis tries its simplest example first; one token per shard and no documents would show nothing."""
    for split in drawn:
        sizes = {b - a for a, b in pairwise(split.bounds)}
        assert len(sizes) > 1 or split.size == 1, split
    rows = [len(_rows(split)) for split in drawn]
    assert {0, 1, BATCH} <= set(rows), rows
    if len(drawn) >= 30 and drawn[0].size > 1:
        starts = [(p, s.bounds) for s in drawn for row in _rows(s) for p in row]
        assert any(p in bounds for p, bounds in starts) and any(p not in bounds for p, bounds in starts)
        assert any(1 in {b - a for a, b in pairwise(s.bounds)} for s in drawn)


def _rows(split: Split) -> tuple[tuple[int, ...], ...]:
    return SequenceShard.whole(split.length, split.documents).document_starts or ()


def matrix_results(rank: int, world_size: int, kind: str, names: list[str], drawn: Sequence[Split]) -> list[Result]:
    shards = [split.shard(dist.group.WORLD) for split in drawn]
    return [COMPUTE[kind](name, s, shard) for s, shard in zip(drawn, shards, strict=True) for name in names]


def check(kind: str, world_size: int, drawn: Sequence[Split]) -> GroupErrors:
    """The largest relative errors of each case, below the tolerance."""
    names = list(MIXER_CASES if kind == "mixer" else MODEL_CASES)
    by_rank = run_ranks(matrix_results, world_size, kind, names, drawn, timeout=1200)
    cases = [(split, name) for split in drawn for name in names]
    errors: GroupErrors = {}
    for (split, name), parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        ours, expected = assembled(list(parts)), expected_result(kind, name, split)
        error, key = worst(ours, expected)
        assert error < TOLERANCE, f"{name}; {split}: {key} differs by {error:.1e}"
        larger(errors, name, grouped({key: difference(ours[key], expected[key]) for key in expected}))
    return errors


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_drawn_splits_equal_whole(world_size: int) -> None:
    met: list[Split] = []

    @settings(DRAWN, max_examples=1)
    @given(awkward(world_size, 3))
    def run(drawn: tuple[Split, ...]) -> None:
        met.extend(drawn)
        check("mixer", world_size, drawn)

    run()
    assert_awkward(met)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["mixer", "model"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_many_drawn_splits_equal_whole(world_size: int, kind: str) -> None:
    errors: GroupErrors = {}
    met: list[Split] = []

    @settings(DRAWN, max_examples=5)
    @given(awkward(world_size, 8))
    def run(drawn: tuple[Split, ...]) -> None:
        met.extend(drawn)
        for name, found in check(kind, world_size, drawn).items():
            larger(errors, name, found)

    run()
    assert len(met) == 40
    assert_awkward(met)
    note(kind, str(world_size), errors)


def form_results(rank: int, world_size: int, drawn: list[Split]) -> list[dict[tuple[str, str, Split], Result]]:
    """By form: all models, and all mixers the first time, then those whose messages forms change. Nodes of two."""
    results = []
    names = list(MIXER_CASES)
    for form in FORMS:
        found, changed = {}, []
        for name in names:
            ledger = CommunicationLedger()
            for split in drawn:
                shard = split.shard(dist.group.WORLD, strategies=form, node_size=2, ledger=ledger)
                found["mixer", name, split] = mixer_result(name, split, shard)
            if changed_by_forms(ledger):
                changed.append(name)
        shard = drawn[0].shard(dist.group.WORLD, strategies=form, node_size=2)
        for name in MODEL_CASES:
            found["model", name, drawn[0]] = COMPUTE["model"](name, drawn[0], shard)
        results.append(found)
        names = changed
    return results


def test_every_form_of_travel_equals_whole() -> None:
    drawn = [Split((0, 7, 12, 20, 26), ((3, 12, 25), (13,))), Split((0, 6, 12, 18, 24))]
    expected: dict[tuple[str, str, Split], Result] = {}
    for form, by_rank in zip(FORMS, zip(*run_ranks(form_results, 4, drawn), strict=True), strict=True):
        for case in by_rank[0]:
            if case not in expected:
                expected[case] = expected_result(*case)
            error, key = worst(assembled([found[case] for found in by_rank]), expected[case])
            assert error < TOLERANCE, f"{case}; {form}: {key} differs by {error:.1e}"
    families = {name.split(",")[0] for _, name, _ in by_rank[0]}
    assert {"mamba", "rwkv7", "s4", "attention", "hyena", "modal_hyena"} <= families


CONFIG: dict[str, Any] = {
    "vocab_size": 48,
    "width": 16,
    "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4, kv_heads=2), mamba+moe(balance=bias, shared=1)]",
    "moe": {"experts": 4, "hidden": 16, "balance_loss": 0.3, "z_loss": 0.1, "bias_speed": 0.01},
    "init_std": 0.2,
}
MANY: dict[str, Any] = {
    **CONFIG,
    "layers": "[rwkv7(head_dim=8), s4d(state=4, dt_min=0.1), retnet(heads=2)+moe, hyena_li, flash(key_dim=4, chunk=5), "
    "lstm, mamba2(head_dim=8, state=4, dt_min=0.1)+moe(balance=bias), conba(variant=linear, state=4), gau(key_dim=4)]",
    "feed_forward": "channel_mix",
    "norm": "rms_outer",
    "tie_embeddings": False,
}
LENGTH, ROWS = 27, 4


def three_steps(
    rank: int, world_size: int, config: dict[str, Any], degrees: dict[str, int]
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and parameters and buffers after three optimiser steps."""
    mesh = Mesh(**degrees)
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.parse(config)).double()
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


def check_training(config: dict[str, Any], degrees: dict[str, int], bias: str) -> dict[str, float]:
    """The largest relative errors of losses, and of parameters and buffers, below the tolerance.

    `bias`: a buffer that must have moved.
    """
    expected = train(build_model(config, seed=5, dtype=torch.float64), None, SequenceShard.whole(LENGTH, [5, 13]))
    assert expected[1][bias].abs().max() > 0.005
    worst_loss = worst_parameter = 0.0
    for losses, parameters in run_ranks(three_steps, 8, config, degrees):
        relative = [abs(ours / theirs - 1) for ours, theirs in zip(losses, expected[0], strict=True)]
        assert max(relative) < TOLERANCE
        worst_loss = max(worst_loss, *relative)
        for name, parameter in expected[1].items():
            error = difference(parameters[name], parameter)
            assert error < TOLERANCE, f"{name} differs by {error:.1e}"
            worst_parameter = max(worst_parameter, error)
    return {"losses": worst_loss, "parameters and buffers": worst_parameter}


@pytest.mark.parametrize("degrees", DEGREES, ids=lambda d: "-".join(f"{k}{v}" for k, v in d.items()))
def test_whole_models_train_alike_on_eight_processes(degrees: dict[str, int]) -> None:
    label = ", ".join(f"{axis} {degree}" for axis, degree in degrees.items())
    note("training", label, check_training(CONFIG, degrees, "blocks.3.feed_forward.selection_bias"))


def test_a_model_of_many_families_trains_alike_on_eight_processes() -> None:
    degrees = {"data": 2, "sequence": 4, "expert": 2}
    errors = check_training(MANY, degrees, "blocks.6.feed_forward.selection_bias")
    note("training", "nine other families: data 2, sequence 4, expert 2", errors)
