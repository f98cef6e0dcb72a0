"""`train.rates` and `train.freeze` against a plain loop of torch's own AdamW in float64, on every kind of mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longstride.data import Stage
from longstride.models import LanguageModel, build_model, weight_decayed
from longstride.parallel import Mesh, SequenceShard
from longstride.workers import ConfigError, Experiment, Trainer, create_run, reopen_run, train_process
from longstride.workers.descent import descend, descendant
from longstride.workers.evaluate import load_run
from longstride.workers.optimization import TrainConfig, learning_rate
from longstride.workers.reporting import Silent
from longstride.workers.stages import train_stages
from longstride.workers.trained_parameters import rate_multiples, still_buffers

from ..distributed import run_ranks
from .tiny import make_trainer, open_run, tiny_experiment

STEPS = 5
# Experts with a balance that is adapted, a gain that is adapted, a recurrence, a filter, keys and values.
SETTINGS = (
    "model.layers=[conba+moe, hyena+moe, attention, mamba+moe]",
    "model.conba.online_rate=0.1",
    "model.moe.balance=bias",
    "train.dtype=float64",
    "train.betas=[0.9, 0.999]",
    f"train.steps={STEPS}",
)
FROZEN = ("embedding.*", "blocks.0.*", "blocks.1.feed_forward.experts.gate_up", "blocks.2.mixer.*")
FREEZE = "train.freeze=[embedding.*, blocks.0.*, blocks.1.feed_forward.experts.gate_up, blocks.2.mixer.*]"
# By what parameters move, the last pattern first.
MULTIPLES = {"*.dt_proj.*": 0.0, "*.filter.output": 0.25, "*.filter.*": 3.0}
RATES = 'train.rates={"*.filter.*": 3, "*.filter.output": 0.25, "*.dt_proj.*": 0}'
Tensors = dict[str, Tensor]


def multiple(name: str, frozen: tuple[str, ...] = FROZEN) -> float:
    if any(fnmatchcase(name, pattern) for pattern in frozen):
        return 0.0
    return next((value for pattern, value in MULTIPLES.items() if fnmatchcase(name, pattern)), 1.0)


def optimizer_group(model: LanguageModel, name: str, value: float) -> dict[str, object]:
    decay = 0.1 if name in weight_decayed(model) else 0.0
    return {"params": [model.get_parameter(name)], "multiple": value, "weight_decay": decay}


def plain(experiment: Experiment, frozen: Mapping[int, tuple[str, ...]]) -> Tensors:
    """The model after the experiment's steps; `frozen` from a step on, no more later than before."""
    train = experiment.train
    model = build_model(experiment.model, seed=experiment.seed, dtype=torch.float64)
    still = {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith("blocks.0.")}
    loader = experiment.data.training(experiment.open_corpus(), seed=experiment.seed)
    optimizer: torch.optim.AdamW | None = None
    for step in range(train.steps):
        if step in frozen:
            names = [name for name, p in model.named_parameters() if not (optimizer and p.requires_grad)]
            for name in names:
                model.get_parameter(name).requires_grad_(multiple(name, frozen[step]) > 0)
            values = {name: multiple(name, frozen[step]) for name in names}
            groups = [optimizer_group(model, name, value) for name, value in values.items() if value]
            if optimizer is None:
                optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.epsilon, foreach=False)
            else:
                for group in groups:
                    optimizer.add_param_group(group)
        assert optimizer is not None
        batch = next(loader)
        shard = SequenceShard.whole(experiment.data.context, batch.document_starts)
        model(batch.tokens_BT, batch.targets_BT, shard).total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step + 1) * group["multiple"]
        optimizer.step()
        optimizer.zero_grad()
        model.end_step()
        for name, before in still.items() if frozen[0] else ():
            model.get_buffer(name).copy_(before)
    loader.close()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def tensors_of(trainer: Trainer) -> Tensors:
    """Whole, on every process."""
    state = trainer.model.state_dict()
    return {k: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone() for k, x in state.items()}


class Kept(Silent):
    """What was noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def noted(self, message: str) -> None:
        self.lines.append(message)


def trained(rank: int, world_size: int, directory: str, *overrides: str) -> Tensors:
    """What `train.steps` steps make; what is frozen has no gradient in any of them, and no moments."""
    trainer = make_trainer(tiny_experiment(directory, f"workers={world_size}", *SETTINGS, *overrides), rank)
    asking = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(trainer.optimizer.parameters) == asking
    assert len(trainer.optimizer.state_dict()) == 2 * len(asking)
    update = trainer.optimizer.step

    def step(rate: float) -> None:
        assert {name for name, p in trainer.model.named_parameters() if p.grad is not None} == asking
        update(rate)

    trainer.optimizer.step = step
    trainer.train()
    return tensors_of(trainer)


def distance(ours: Tensors, theirs: Tensors) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny_experiment("/nowhere", *SETTINGS)


@pytest.fixture(scope="module")
def beginning(experiment: Experiment) -> Tensors:
    return dict(build_model(experiment.model, seed=experiment.seed, dtype=torch.float64).state_dict())


@pytest.fixture(scope="module")
def expected(experiment: Experiment) -> Tensors:
    return plain(experiment, {0: FROZEN})


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (1, []),
        (2, ["parallel.sequence=2", "parallel.expert=2", "model.recompute=true"]),
        (2, ["parallel.data=2", "parallel.expert=1", "train.accumulate=2"]),
        (2, ["parallel.sequence=2", "train.canonical=4"]),
        (4, ["parallel.replicate=2", "parallel.sequence=2", "parallel.expert=2"]),
    ],
    ids=["alone", "sequence", "data", "canonical", "copies"],
)
def test_it_is_a_plain_loop(
    beginning: Tensors, expected: Tensors, tmp_path: Path, workers: int, settings: list[str]
) -> None:
    found = run_ranks(trained, workers, str(tmp_path), FREEZE, RATES, *settings)
    for each in found:
        assert distance(each, expected) < 1e-10
    for name, before in beginning.items():
        frozen = multiple(name) == 0
        assert found[0][name].equal(before) == frozen, f"{name} {'moved' if frozen else 'stayed'}"


def test_the_comparison_can_fail(experiment: Experiment, expected: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing frozen; a parameter less frozen; a rate forgotten."""
    assert distance(plain(experiment, {0: ()}), expected) > 1e-3
    assert distance(plain(experiment, {0: FROZEN[:-1]}), expected) > 1e-3
    monkeypatch.setitem(MULTIPLES, "*.filter.output", MULTIPLES["*.filter.*"])
    assert distance(plain(experiment, {0: FROZEN}), expected) > 1e-4


def in_half_precision(rank: int, world_size: int, directory: str) -> Tensors:
    """Matrices and what stays in float32 are two groups of a layer, and each has frozen ones and others."""
    words = ("train.dtype=bfloat16", f"workers={world_size}", "parallel.sequence=2")
    trainer = make_trainer(tiny_experiment(directory, *SETTINGS, FREEZE, RATES, *words), rank)
    trainer.train()
    return tensors_of(trainer)


def test_in_half_precision_too(beginning: Tensors, tmp_path: Path) -> None:
    found = run_ranks(in_half_precision, 2, str(tmp_path))[0]
    stayed = {name for name, before in beginning.items() if found[name].equal(before.float())}
    assert stayed == {name for name in beginning if multiple(name) == 0}


# Of the second start: nothing is frozen but what still is after thawing.
STILL = ("embedding.*", "blocks.0.*")
THAW = "train.freeze=[embedding.*, blocks.0.*]"


def in_starts(rank: int, world_size: int, directory: str, first: str, later: str) -> tuple[list[Tensors], list[str]]:
    """After two steps with one set of frozen parameters, two with another, one more in another start; what was said."""
    after: list[Tensors] = []
    said: list[str] = []
    for until, freeze in ((2, first), (4, later), (STEPS, later)):
        words = (*SETTINGS, RATES, freeze, f"workers={world_size}", "parallel.sequence=2")
        experiment, noted = tiny_experiment(directory, *words), Kept()
        mesh, run = Mesh(**asdict(experiment.degrees)), open_run(experiment, rank)
        trainer = Trainer(experiment, mesh, run, noted)
        if until > 2:
            trainer.restore()
            trainer.loader.seek(trainer.position)
        while trainer.step_count < until:
            trainer.step()
        trainer.save()
        trainer.loader.close()
        after.append(tensors_of(trainer))
        said += [f"{until}: {line}" for line in noted.lines]
    return after, said


def test_interrupted_is_bitwise_the_same(tmp_path: Path) -> None:
    whole = run_ranks(trained, 2, str(tmp_path / "whole"), FREEZE, RATES, "parallel.sequence=2")[0]
    (*_, parts), said = run_ranks(in_starts, 2, str(tmp_path / "parts"), FREEZE, FREEZE)[0]
    assert said == []
    assert all(parts[name].equal(whole[name]) for name in whole)


def test_what_is_thawed_begins_as_in_a_plain_loop(experiment: Experiment, expected: Tensors, tmp_path: Path) -> None:
    """Its count of steps is zero too, without which Adam's first ones would be three times as long."""
    (*_, found), said = run_ranks(in_starts, 2, str(tmp_path), FREEZE, THAW)[0]
    assert distance(found, plain(experiment, {0: FROZEN, 2: STILL})) < 1e-10
    assert distance(found, expected) > 1e-3
    (line,) = said
    assert line.startswith(
        "4: trained from step 3 on, with optimiser state that begins anew: blocks.1.feed_forward.exp"
    )
    assert "and 2 more (5 of " in line


def test_what_is_frozen_later_stays_where_it_was(beginning: Tensors, tmp_path: Path) -> None:
    (two, _, five), said = run_ranks(in_starts, 2, str(tmp_path), THAW, FREEZE)[0]
    (line,) = said
    assert line.startswith("4: frozen from step 3 on, and their optimiser state is dropped: blocks.1.feed_forward.ex")
    for name, before in beginning.items():
        assert two[name].equal(before) == (multiple(name, STILL) == 0), name
        assert five[name].equal(two[name]) == (multiple(name) == 0), name


def through_stages(rank: int, world_size: int, directory: str) -> tuple[Tensors, list[str]]:
    """Two stages: sequences whole, then split."""
    schedule = "data.schedule=32 for 2 steps"
    words = ("train.steps=4", "data.batch=1", "workers=2", "parallel.data=auto", "parallel.sequence=auto", schedule)
    experiment, noted = tiny_experiment(directory, *SETTINGS, FREEZE, RATES, *words), Kept()
    run, meshes = open_run(experiment, rank), []

    def make(now: Experiment, stage: Stage) -> Trainer:
        meshes.append((now.degrees.data, now.degrees.sequence))
        return Trainer(now, Mesh(**asdict(now.degrees)), run, noted, stage=stage)

    trainer = train_stages(experiment, run, make, resume=False)
    assert meshes == [(2, 1), (1, 2)] and trainer.step_count == 4
    return tensors_of(trainer), noted.lines


def test_stages_keep_what_is_frozen(beginning: Tensors, tmp_path: Path) -> None:
    found, said = run_ranks(through_stages, 2, str(tmp_path))[0]
    assert said == []
    for name, before in beginning.items():
        assert found[name].equal(before) == (multiple(name) == 0), name


def test_the_last_pattern_that_matches_counts() -> None:
    model = build_model({"vocab_size": 11, "width": 12, "layers": "[rwkv4, mamba+moe(balance=bias)]"}, device="meta")
    assert rate_multiples(model, TrainConfig())["blocks.0.mixer.time_decay"] == 2, "as its layer declares"
    rates = {"*": 0, "blocks.1.*": 0.5, "*.time_*": 3, "*.time_first": 4}
    found = rate_multiples(model, TrainConfig(rates=rates, freeze=("*.A_log",)))
    assert found["blocks.0.mixer.time_decay"] == 3 and found["blocks.0.mixer.time_first"] == 4
    assert found["blocks.1.mixer.A_log"] == 0, "freeze comes after rates"
    others = {name: value for name, value in found.items() if ".time_" not in name and not name.endswith("A_log")}
    assert others == {name: 0.5 if name.startswith("blocks.1.") else 0 for name in others}
    assert found["blocks.1.feed_forward.selection_bias"] == 0.5, "a buffer that its layer may adapt again"
    assert still_buffers(model, TrainConfig(rates={"*": 0, "blocks.1.mixer.*": 1})) != []


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            "train.freeze=[blocks.9.*]",
            r"train.freeze: 'blocks.9.\*' matches no parameter of the model; what does and looks like it: blocks.\d",
        ),
        ("train.freeze=[embedding]", r"looks like it: embedding\.\*"),
        ('train.rates={"*.A_logs": 0.5}', r"train.rates: '\*.A_logs' matches .* like it: \*.A_log\b"),
        ('train.rates={"blocks.0.feed_forward.selection_bias": 0.5}', r"selection_bias' matches no parameter"),
        ("train.freeze=[zzzzzz]", r"names are embedding.weight, .* and \d+ more"),
        ('train.freeze=["*"]', r"train.freeze=\['\*'\] leaves no parameter to train; take a pattern out"),
        ('train.rates={"*": 0}', r"train.rates={'\*': 0.0} leaves no parameter to train"),
        ('train.rates={"embedding.*": -1}', r"train.rates.embedding.\*=-1: the value should be greater than or equal"),
        ("train.freeze=[*.mixer.*]", r"is not valid YAML; quote what begins with \*, as in \['\*.bias'\]"),
        ("train.freeze=embedding.*", r"train.freeze='embedding.\*': the value should be a list, as in"),
    ],
)
def test_mistakes_are_named_before_anything_starts(tmp_path: Path, setting: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        create_run(tiny_experiment(str(tmp_path), *SETTINGS, setting))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_tuned_in_part_from_anothers_weights(tmp_path: Path) -> None:
    words = ("train.steps=1", "train.warmup=0", "sample.tokens=0", "model.layers=[mamba, mamba]", "data.batch=1")
    parent = create_run(experiment := tiny_experiment(str(tmp_path), *words))
    train_process(experiment, threads=1, device="cpu")
    tuned = descendant(parent, str(tmp_path / "tuned"), ["train.freeze=[embedding.*, blocks.0.*]"])
    child, *_ = descend(parent, tuned)
    train_process(reopen_run(child), run=child.url, threads=1, device="cpu", resume=True)
    ours, theirs = (load_run(run, each).model.state_dict() for run, each in ((child, tuned), (parent, experiment)))
    stayed = {name for name in ours if ours[name].equal(theirs[name])}
    assert stayed == {name for name in ours if name.startswith(("embedding.", "blocks.0."))} < set(ours)
    with pytest.raises(ConfigError, match=r"train.freeze: 'blocks.2.\*' matches no parameter"):
        descend(parent, descendant(parent, str(tmp_path / "other"), ["train.freeze=[blocks.2.*]"]))
    assert not (tmp_path / "other").exists()
