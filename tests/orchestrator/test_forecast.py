"""Forecasts beside what real runs count: bytes by motion, parameters and moments in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from longstride.models import build_model
from longstride.orchestrator import rehearsal
from longstride.orchestrator.cli import main
from longstride.orchestrator.forecast import forecast
from longstride.orchestrator.rehearsal import EXPERTS, motion_family
from longstride.parallel import local_part

from ..distributed import run_ranks
from ..workers.tiny import make_trainer, tiny_experiment

MOE = ("model.moe.experts=4", "model.moe.top_k=2", "model.moe.hidden=24")


def first_step(rank: int, world_size: int, directory: str, overrides: tuple[str, ...]) -> tuple[Counter[str], int, int]:
    """Bytes that this process sent by motion, and those of its parameters and of its moments."""
    experiment = tiny_experiment(directory, f"workers={world_size}", *overrides)
    trainer = make_trainer(experiment, rank)
    trainer.step()
    trainer.loader.close()
    sent = Counter[str]()
    for row in trainer.ledger.rows():
        sent[motion_family(row.motion)] += row.bytes_sent
    parameters = sum(local_part(parameter).nbytes for parameter in trainer.model.parameters())
    return sent, parameters, sum(local_part(moment).nbytes for moment in trainer.optimizer.state_dict().values())


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, ("model.layers=[mamba, hyena, attention, mamba]", "parallel.sequence=2")),
        (
            4,
            (
                "model.layers=[mamba, rwkv7, mamba2, s4d]",
                "model.rwkv7.head_dim=8",
                "model.mamba2.head_dim=8",
                "parallel.sequence=4",
                "data.batch=3",
            ),
        ),
        (4, ("model.layers=[mamba, attention]", "parallel.replicate=2", "data.batch=2", "train.dtype=bfloat16")),
        (2, ("model.layers=[mamba, attention+moe]", *MOE, "parallel.sequence=2", "model.recompute=true")),
        (4, ("model.layers=[mamba+moe]", *MOE, "model.moe.balance=bias", "parallel.data=2", "parallel.expert=2")),
        (2, ("model.layers=[mamba+moe]", *MOE, "train.accumulate=2", "parallel.sequence=2")),
        (2, ("model.layers=[mamba+moe]", *MOE, "model.moe.balance=bias", "train.accumulate=2", "parallel.sequence=2")),
    ],
    ids=[
        "motions",
        "recurrences",
        "copies in half precision",
        "experts",
        "biased experts",
        "parts",
        "parts and a bias",
    ],
)
def test_bytes_are_those_of_a_real_step(tmp_path: Path, world_size: int, overrides: tuple[str, ...]) -> None:
    processes = run_ranks(first_step, world_size, str(tmp_path), overrides)
    found = next(forecast(tiny_experiment(str(tmp_path), f"workers={world_size}", *overrides), "cpu"))
    motions = {motion for sent, _, _ in processes for motion in sent}
    most = {motion: count for motion in motions if (count := max(sent[motion] for sent, _, _ in processes))}
    assert found.sent.pop(EXPERTS, 0) == pytest.approx(most.pop(EXPERTS, 0), rel=0.5), "as the router likes it"
    assert dict(found.sent) == most
    assert found.memory["parameters"] == max(parameters for _, parameters, _ in processes)
    assert found.memory["optimiser"] == max(moments for _, _, moments in processes)


def test_what_is_frozen_has_neither_moments_nor_gradients_to_send(tmp_path: Path) -> None:
    """Nor are layers gathered again that the backward pass does not come to."""
    freeze = "train.freeze=[embedding.*, 'blocks.[0-2].*', '*.q_proj.*']"
    words = ("model.layers=[mamba, mamba+moe, mamba, attention]", "parallel.sequence=2", "train.dtype=bfloat16", freeze)
    processes = run_ranks(first_step, 2, str(tmp_path), words)
    found, whole = (next(forecast(tiny_experiment("/x", "workers=2", *each), "cpu")) for each in (words, words[:-1]))
    for motion in ("fsdp.all_gather", "fsdp.reduce_scatter"):
        assert found.sent[motion] == max(sent[motion] for sent, _, _ in processes) < whole.sent[motion]
    assert found.memory["parameters"] == max(parameters for _, parameters, _ in processes) == whole.memory["parameters"]
    assert found.memory["optimiser"] == max(moments for _, _, moments in processes) < whole.memory["optimiser"] / 4
    assert 2 * found.memory["gradients"] == found.memory["optimiser"]


@pytest.mark.parametrize("layers", ["[mamba, attention+moe, mamba]", "[mamba, hyena+moe, attention, mamba+moe]"])
def test_activations_are_what_autograd_keeps(tmp_path: Path, layers: str) -> None:
    """Of the whole model, with experts as its router loads them."""
    experiment = tiny_experiment(
        str(tmp_path), f"model.layers={layers}", "model.hyena.max_length=512", "data.context=512"
    )
    model = build_model(experiment.model)
    kept = rehearsal.Kept(model)
    tokens_BT = torch.randint(256, (experiment.data.batch, 512))
    with kept:
        model.loss(tokens_BT, tokens_BT)
    memory = next(forecast(experiment, "cpu")).memory
    logits = 1024 * 256 * 8  # hold gradients already, and are gone when autograd keeps
    assert memory["activations"] + memory["loss"] - logits == pytest.approx(kept.total, rel=0.1)


def test_long_sequences_are_in_line_with_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is carried on from short shards is what the long ones cost, to the byte for messages."""
    words = ("model.layers=[mamba, attention, retnet]", "data.context=2048", "workers=2", "parallel.sequence=2")
    experiment = tiny_experiment(str(tmp_path), *words, "model.retnet.heads=2")
    carried = next(forecast(experiment, "cpu"))
    monkeypatch.setattr(rehearsal, "SHORT", 1024)
    run = next(forecast(experiment, "cpu"))
    assert carried.sent == run.sent
    assert carried.memory == pytest.approx(run.memory, rel=1e-3)
    monkeypatch.setattr(rehearsal, "SHORT", 2)
    assert next(forecast(experiment, "cpu")).sent != run.sent, "filters reach further than two tokens"


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growing = ("data.batch=1", "data.schedule=64 for 4 steps")
    assert main(["plan", "small.yaml", *growing, "--workers", "2", "--memory", "80GiB"]) == 0
    printed = capsys.readouterr().out
    assert "6 steps of 128 tokens" in printed
    assert [line.split()[:4] for line in printed.splitlines()[4:6]] == [
        ["1-4", "2", "x", "64"],
        ["5-6", "1", "x", "128"],
    ]
    assert "data 2 x expert 2" in printed and "sequence 2 x expert 2" in printed and "prefix_state" in printed
    assert not list(place.glob("runs")), "it leaves nothing behind"

    assert main(["plan", "small.yaml", "--memory", "100k"]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("does not fit: ") and "of it activations; set train.accumulate=2" in line

    for words, message in (
        (["--memory", "much"], "'much' is no amount of memory; write it as 80GiB"),
        (["--workers", "3", "parallel.sequence=3"], "data.context=128 does not divide over parallel.sequence=3"),
    ):
        assert main(["plan", "small.yaml", *words]) == 2
        assert message in capsys.readouterr().err
