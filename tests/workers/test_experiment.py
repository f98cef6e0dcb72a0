"""The whole configuration: read, overridden, written and read again; mistakes are one line before anything starts."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from longstride.data import prepare
from longstride.workers import ConfigError, Experiment, create_run
from longstride.workers.experiment import default_name
from longstride.workers.launch import check
from longstride.workers.optimization import TrainConfig, learning_rate

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
MIXED = """
workers: 2
model: hybrid-small
data: {corpus: python-source, context: 512, batch: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mixed.yaml"
    path.write_text(MIXED)
    return str(path)


def test_overrides_reach_everything_also_into_a_preset(config: str) -> None:
    experiment = Experiment.load(
        config, ["workers=1", "model.width=32", "train.learning_rate=1e-4", "parallel.sequence=1", "run.name=here"]
    )
    assert (experiment.workers, experiment.model.width, experiment.train.learning_rate) == (1, 32, 1e-4)
    assert experiment.model.num_experts == 4  # the rest of the preset stays
    assert experiment.run.name == "here"
    other = Experiment.load(config, ["model.width=32", "model=mamba-small", "model.width=48"])
    assert (other.model.width, other.model.num_experts) == (48, 0)


def test_the_resolved_experiment_is_read_again_as_it_was(config: str, tmp_path: Path) -> None:
    experiment = Experiment.load(config, ["train.betas=[0.8, 0.99]", "sample.prompt='é: \"'"])
    (tmp_path / "again.yaml").write_text(experiment.to_yaml())
    assert Experiment.load(str(tmp_path / "again.yaml")) == experiment


def test_options_of_layers_that_a_model_lacks_are_left_out(config: str, tmp_path: Path) -> None:
    words = ["model=mamba-small", "model.retnet.heads=4"]
    experiment = Experiment.load(config, words)
    text = experiment.to_yaml()
    found = yaml.safe_load(text)["model"]
    assert found["mamba"]["state"] == experiment.model.mamba.state and found["retnet"]["heads"] == 4, (
        "one is not default"
    )
    assert not found.keys() & {"s4d", "rwkv7", "moe", "attention"}
    (tmp_path / "again.yaml").write_text(text)
    assert Experiment.load(str(tmp_path / "again.yaml")) == experiment
    (tmp_path / "later.yaml").write_text(text.replace("retnet:", "retentive:"))
    with pytest.raises(ConfigError, match=r"unknown setting model\.retentive"):
        Experiment.load(str(tmp_path / "later.yaml"))


def test_a_run_is_named_after_its_config_and_the_time() -> None:
    assert default_name("s3://bucket/my config.v2.yaml").startswith("my-config-v2-20")
    assert default_name("configs/quickstart.yaml").count("-") == 2


def test_degrees_left_to_themselves(config: str) -> None:
    degrees = Experiment.load(config, ["workers=4", "parallel.data=2"]).degrees
    assert (degrees.replicate, degrees.data, degrees.sequence, degrees.expert) == (1, 2, 2, 4)


@pytest.mark.parametrize("override", ["evaluate.lengths=2k", "evaluate.lengths=2048", "evaluate.lengths=[2k]"])
def test_lengths_are_written_as_contexts_are(config: str, override: str) -> None:
    assert Experiment.load(config, [override]).evaluate.lengths == (2048,)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("trian.steps=3", "unknown setting trian; did you mean train?"),
        ("train.step=3", "unknown setting train.step; did you mean train.steps?"),
        ("data.contxt=3", "unknown setting data.contxt; did you mean data.context?"),
        ("model.mamba.stat=3", "unknown setting model.mamba.stat; did you mean model.mamba.state?"),
        ("parallel.sequnce=3", "unknown setting parallel.sequnce; did you mean parallel.sequence?"),
        ("model=mambo-small", "mamba-small"),
        ("train.steps=lots", "train.steps='lots': the value should be a valid integer"),
        ("train.dtype=float16", "train.dtype='float16': the value should be 'float32', 'float64' or 'bfloat16'"),
        ("workers=0", "workers=0"),
        ("parallel.sequence=3", "set workers=3 or change a degree"),
        ("data.context=511", "the nearest that does is data.context=510 or 512"),
        ("data.context=1", "data.context=2"),
        ("parallel.expert=3", "does not divide the model's 4 experts"),
        ("parallel=[1]", "parallel=[1]"),
        ("train.warmup=2000", "train.warmup=2000 leaves nothing of train.steps=1000"),
        ("run.directory=s3:/bucket/runs", "s3:/bucket/runs has one slash behind the colon: write s3://bucket/runs"),
        ("evaluate.lengths=[64, 1g]", "'1g' is no number of tokens; write it as 8192, 8k or 1M"),
        ("run.name=../elsewhere", "run.name='../elsewhere' cannot be used"),
        ("tracking.uri=http://me:hunter2@host", "tracking.uri=http://***@host holds credentials"),
        ("model.layers='[mamba, mumba]'", "mumba"),
    ],
)
def test_mistakes_are_one_line(config: str, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.load(config, [override])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_batch_must_divide_over_the_data_degree(config: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.batch=3 does not divide .* set data\.batch=4"):
        Experiment.load(config, ["data.batch=3", "parallel.data=2"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.corpus=pyton-source", "did you mean 'python-source'"),
        ("model.vocab_size=100", "set model.vocab_size=256"),
        ("data.context=32768", "data.context=32768 exceeds the 16384 positions of the model"),
        ("data.context=1000000000", "data.context"),
        ("sample.prompt=''", "sample.prompt is empty"),
        ("sample.tokens=20000", "set sample.tokens="),
    ],
)
def test_what_only_the_data_and_the_model_show_is_refused_before_a_run_is_made(
    config: str, tmp_path: Path, override: str, line: str
) -> None:
    experiment = Experiment.load(config, [override, f"run.directory={tmp_path}/runs"])
    with pytest.raises(ValueError) as caught:
        create_run(experiment)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        Experiment.load(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="is a directory"):
        Experiment.load(str(tmp_path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configs_are_sound(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = Experiment.load(str(path))
    if experiment.data.corpus == "corpora/sounds":  # the one that is the reader's to prepare
        seconds = np.arange(60 * 16000) / 16000
        soundfile.write("hum.wav", np.sin(100 * seconds), 16000)
        prepare("hum.wav", experiment.data.corpus)
    check(experiment)


def test_the_quickstart_splits_everything_and_also_runs_alone() -> None:
    path = next(str(path) for path in CONFIGS if path.stem == "quickstart")
    degrees = Experiment.load(path).degrees
    assert (degrees.data, degrees.sequence, degrees.expert) == (1, 2, 2)
    alone = Experiment.load(path, ["parallel.sequence=1", "workers=1"]).degrees
    assert (alone.data, alone.sequence, alone.expert) == (1, 1, 1)
    four = Experiment.load(path, ["workers=4", "parallel.data=2", "data.batch=2"]).degrees
    assert (four.data, four.sequence, four.expert) == (2, 2, 4)


def test_the_learning_rate_warms_up_and_falls() -> None:
    config = TrainConfig(steps=110, warmup=10, learning_rate=1.0, final_fraction=0.1)
    rates = [learning_rate(config, step) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[59] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_workers_know_nothing_of_ray() -> None:
    for path in (Path(__file__).parents[2] / "workers").glob("*.py"):
        names = [
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            for alias in getattr(node, "names", [])
            if isinstance(node, ast.Import)
        ]
        assert "ray" not in names, path
