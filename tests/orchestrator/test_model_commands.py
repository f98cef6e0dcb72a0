"""Commands on a finished run's model: evaluate, generate, export and import; in one process and under torchrun."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from longstride.orchestrator.cli import main
from longstride.workers import Experiment
from longstride.workers.manifest import list_checkpoints
from longstride.workers.run_directory import RunDirectory

TASK = """
workers: 1
model: {vocab_size: 256, width: 16, layers: "[mamba] x 2", feed_forward: none, mamba: {state: 4}}
data:
  {corpus: selective-copying, context: 48, batch: 4, validation_sequences: 6, tasks: {selective_copying: {tokens: 4}}}
train: {steps: 2}
checkpoint: {every: 1, keep: 0, keep_best: 1}
sample: {tokens: 4}
tracking: {enabled: false}
run: {name: copying}
"""


@pytest.fixture
def task(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run of two steps on a task."""
    (place / "task.yaml").write_text(TASK)
    assert main(["train", "task.yaml"]) == 0
    capsys.readouterr()
    return place / "runs" / "copying"


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    """The command in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "longstride.orchestrator", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_accuracy_by_length_split_and_whole(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = "evaluate.lengths=[32, 101]"
    assert main(["evaluate", "copying", lengths, "evaluate.sequences=5"]) == 0
    alone = capsys.readouterr().out
    step, header, short, long = table(alone)
    assert step == ["step", "2"] and header[:5] == ["LENGTH", "SEQUENCES", "TARGETS", "CORRECT", "ACCURACY"]
    assert short[:3] == ["32", "5", "20"] and long[:3] == ["101", "5", "20"]
    assert short[4] == f"{int(short[3]) / 20:.2%}"
    first = ["evaluate", "copying", "--checkpoint", "1", lengths, "evaluate.sequences=5"]
    assert main(first) == 0
    before = capsys.readouterr().out
    assert before.splitlines()[0] == "step               1" and before.splitlines()[1:] != alone.splitlines()[1:]
    result = launched(*first)
    assert result.returncode == 0, result.stderr
    assert result.stdout == before

    assert main(["evaluate", "copying"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "held-out tokens    24 in 6 sequences of 48"
    assert lines[-1].startswith("accuracy ") and lines[-1].endswith("of 24 targets)")


def test_one_checkpoint_is_chosen(task: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {found.step: found.read_manifest().validation_loss for found in list_checkpoints(RunDirectory(str(task)))}
    best = min(losses, key=lambda step: losses[step] or math.inf)
    assert set(losses) == {1, 2} and None not in losses.values()
    assert main(["export", "copying", "best", "--layout", "mamba", "--checkpoint", "best"]) == 0
    assert f"best holds the run's weights after step {best} as mamba" in capsys.readouterr().out
    for step in losses:
        assert main(["export", "copying", str(step), "--layout", "mamba", "--checkpoint", str(step)]) == 0
    capsys.readouterr()
    one, two, found = (load_file(place / name / "model.safetensors") for name in ("1", "2", "best"))
    chosen = {1: one, 2: two}[best]
    assert all(found[key].equal(chosen[key]) for key in found)
    assert not all(one[key].equal(two[key]) for key in one)
    assert main(["import", "copying", "runs/child", "--checkpoint", "1"]) == 0
    assert "holds the weights of copying after step 1 as step 0" in capsys.readouterr().out
    assert main(["export", "child", "child", "--layout", "mamba"]) == 0
    imported = load_file(place / "child" / "model.safetensors")
    assert all(imported[key].equal(one[key]) for key in one)
    capsys.readouterr()
    texts = set()
    for which in ("latest", "2", "step-00000002", "1"):
        assert main(["generate", "copying", "--prompt", "1 2", "--tokens", "30", "--checkpoint", which]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 2


def test_hyena_decodes_in_modes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hyena = '"[hyena]", feed_forward: none, hyena: {max_length: 64, filter_width: 8}}'
    (place / "hyena.yaml").write_text(TASK.replace('"[mamba] x 2", feed_forward: none, mamba: {state: 4}}', hyena))
    assert main(["train", "hyena.yaml", "train.steps=1"]) == 0
    words = ["generate", "copying", "--prompt", "1 2", "--temperature", "0", "--tokens"]
    assert main([*words, "30"]) == 0
    exact = capsys.readouterr().out.splitlines()[-1]
    assert main([*words, "30", "--modes", "8"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1] == exact
    assert output.err.startswith("note: layer 0: 8 modes miss ") and " of the filters\n" in output.err
    assert main([*words, "80"]) == 2 and "exceed the model's 64 positions" in capsys.readouterr().err
    assert main([*words, "80", "--modes", "8"]) == 0, "modes have no longest sequence"
    capsys.readouterr()
    assert main([*words, "9", "--modes", "0"]) == 2
    assert capsys.readouterr().err == "longstride: --modes 0: give at least 1\n"


def test_loss_by_position_of_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "small"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows[-3][:3] == ["POSITION", "OF", "128"]
    assert [row[0] for row in rows[-2:]] == ["0-63", "64-127"]
    assert main(["evaluate", "small", "evaluate.lengths=[64, 99000000]"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("longstride: evaluate.lengths: 99000000 exceeds the ") and "data.context" not in error
    held_out = re.search(r"exceeds the (\d+) held-out tokens of data.corpus=python-source; set .*=\[\1\]", error)
    assert held_out, error
    corpus = Experiment.resume(RunDirectory(str(place / "runs" / "small"))).data.open()
    assert int(held_out[1]) == corpus.num_tokens("validation")


def test_out_and_in_again(task: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "copying", "out", "--layout", "mamba"]) == 0
    assert "out holds the run's weights after step 2 as mamba" in capsys.readouterr().out
    assert main(["import", "out", "runs/mine", "data.context=64", "tracking.enabled=false"]) == 0
    assert "longstride generate" in capsys.readouterr().out
    assert main(["checkpoints", "mine", "--verify"]) == 0
    assert "step-00000000" in capsys.readouterr().out
    assert main(["generate", "mine", "--prompt", "9 8 7", "--tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("9 8 7")
    prompts = ["--prompt", "9 8 7", "--prompt", "9 8 6", "--prompt", "1"]
    assert main(["generate", "mine", *prompts, "--tokens", "5"]) == 0
    several = capsys.readouterr().out
    assert several.startswith(text) and "\n9 8 6" in several and "\n1 " in several

    result = launched("import", "out", "runs/split", "data.context=64", "tracking.enabled=false")
    assert result.returncode == 0, result.stderr
    assert main(["generate", "split", "--prompt", "9 8 7", "--tokens", "5"]) == 0
    assert capsys.readouterr().out == text
    words = ["generate", "split", "--prompt", "9 8 7", "--tokens", "20"]
    words += ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--seed"]
    assert main([*words, "3"]) == 0
    drawn = capsys.readouterr().out
    assert main([*words, "4"]) == 0
    assert capsys.readouterr().out != drawn
    result = launched(*words, "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout == drawn
    result = launched("export", "split", "again", "--layout", "mamba")
    assert result.returncode == 0, result.stderr
    result = launched("import", "copying", "runs/child", "data.context=64")
    assert result.returncode == 0, result.stderr
    assert "runs/child holds the weights of copying after step 2 as step 0" in result.stdout
    assert main(["export", "child", "third", "--layout", "mamba"]) == 0
    before, after = (load_file(place / name / "model.safetensors") for name in ("out", "again"))
    assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)
    assert (place / "third" / "model.safetensors").read_bytes() == (place / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["import", "nowhere", "runs/mine"], "no directory nowhere"),
        (["import", "task.yaml", "runs/mine"], "task.yaml"),
        (["import", "copying", "runs/mine", "data.corpus=python-source"], "was trained on ids-16"),
        (["import", "copying", "runs/mine", "--checkpoint", "7"], "no checkpoint 7; the steps that it has: 1, 2"),
        (["export", "copying", "out", "--layout", "llama"], "mamba+none; mamba or state-spaces can hold it"),
        (["export", "copying", "out", "--layout", "lama"], "no layout 'lama'"),
        (["export", "copying", "s3://bucket/out", "--layout", "mamba"], "OUT=s3://bucket/out is a URL"),
        (["export", "coping", "out", "--layout", "mamba"], "did you mean copying?"),
        (["evaluate", "copying", "workers=2"], "torchrun --nproc-per-node 2 -m longstride.orchestrator evaluate"),
        (
            ["evaluate", "copying", "evaluate.lengths=[7]"],
            "evaluate.lengths: 7: 4 tokens and their markers need 8 or more",
        ),
        (["evaluate", "copying", "evaluate.lengths=[0]"], "greater than or equal to 1"),
        (["evaluate", "copying", "data.tasks.selective_copying.token=3"], "did you mean"),
        (["generate", "copying", "--prompt", "1 2 256"], "'256' is no token of this task"),
        (["generate", "copying", "--prompt", "1", "--checkpoint", "newest"], "ask for latest, best, or a step"),
        (["evaluate", "copying", "--checkpoint", "7"], "no checkpoint 7; the steps that it has: 1, 2"),
    ],
)
def test_mistakes_are_one_line(task: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    output = capsys.readouterr()
    assert line in output.err and len(output.err.splitlines()) == 1
    assert not (task.parent / "mine").exists()


def test_a_mistake_of_two_processes_is_told_once(task: Path) -> None:
    result = launched("evaluate", "copying", "evaluate.lengths=[7]")
    assert result.returncode != 0
    assert result.stderr.count("longstride: ") == 1, result.stderr
