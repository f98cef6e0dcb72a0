"""The life of a run through the command, without Ray: alone in one process, and under torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longstride.orchestrator.cli import main
from longstride.orchestrator.generation import _pieces
from longstride.workers import find_run

from .commands import GROWING, losses


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run of six steps."""
    assert main(["train", "small.yaml"]) == 0
    assert "longstride resume runs/small" in capsys.readouterr().out
    return place / "runs" / "small"


def test_train_resume_generate_evaluate_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(losses(run)) == 6

    assert main(["runs"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["RUN", "STATE", "STEP", "LOSS", "VALIDATION"]
    assert line.split()[:3] == ["small", "finished", "6/6"]

    assert main(["resume", "runs/small", "train.steps=8"]) == 0
    assert len(losses(run)) == 8
    capsys.readouterr()

    assert main(["checkpoints", "small", "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["step-00000006", "step-00000008"]
    assert all(line.endswith("whole, verified") for line in lines)

    assert main(["evaluate", "small"]) == 0
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"loss               {record['validation_loss']:.4f} nats" in capsys.readouterr().out

    texts = []
    for temperature in ("0", "0", "5"):
        words = ["--prompt", "def é", "--tokens", "40", "--temperature", temperature]
        assert main(["generate", "small", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("def é") for text in texts)
    assert texts[0] == texts[1] != texts[2]

    assert main(["generate", "small"]) == 0
    assert capsys.readouterr().out.startswith("def "), "the run's own prompt"
    settings = (run / "experiment.yaml").read_text()
    assert "  prompt: 'def '\n" in settings
    (run / "experiment.yaml").write_text(settings.replace("prompt: 'def '", "prompt: null"))
    for words, line in (
        ([], "; give --prompt TEXT to continue"),
        (["--prompt", "a", "--out", "a.wav"], "is for sound"),
    ):
        assert main(["generate", "small", *words]) == 2
        assert line in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_resumed_losses_are_those_of_the_run_that_went_on(run: Path, place: Path) -> None:
    """Bitwise, from a checkpoint in the middle of the schedule."""
    reference = losses(run)
    find_run("runs/small").storage.remove("checkpoints/step-00000006")
    assert main(["resume", "runs/small"]) == 0
    assert losses(run) == reference
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2


def test_a_damaged_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run / "checkpoints" / "step-00000006"
    shard = next(directory.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["checkpoints", "small"]) == 0  # nothing was read yet
    capsys.readouterr()
    assert main(["checkpoints", "small", "--verify"]) == 1
    whole, broken = capsys.readouterr().out.splitlines()[1:]
    assert whole.endswith("whole, verified")
    assert broken.startswith("step-00000006")
    assert f"broken: {shard.name} is damaged" in broken
    assert main(["generate", "small", "--prompt", "a", "--tokens", "1"]) == 0
    assert "step-00000006 is skipped" in capsys.readouterr().err


def test_a_refused_resume_leaves_the_run_as_it_was(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "experiment.yaml").read_text()
    assert main(["resume", "small", "train.steps=9", "--address", "127.0.0.1:1"]) == 2
    assert (run / "experiment.yaml").read_text() == before
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_a_bug_is_one_line_and_a_file(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a checkpoint was written: the line names the error, the notes say where the rest is and how to go on."""
    from longstride.workers import Trainer

    step = Trainer.step

    def failing_step(trainer: Trainer) -> object:
        if trainer.step_count == 3:
            raise IndexError("out of\nrange")
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", failing_step)
    assert main(["train", "small.yaml"]) == 1
    cause, details, advice = capsys.readouterr().err.splitlines()
    assert cause == "longstride: IndexError: out of range"
    assert details.startswith("details:")
    assert "Traceback" in (place / "runs" / "small" / "failure.txt").read_text()
    assert "resume" in advice
    assert "from step 2" in advice
    assert main(["runs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["small", "stopped", "3/6"], "though just now it ran"


def test_a_damaged_run_does_not_hide_the_others(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, place / "runs" / "other")
    (run / "run.json").write_text("{")
    assert main(["runs"]) == 0
    output = capsys.readouterr()
    assert [line.split()[:2] for line in output.out.splitlines()[1:]] == [
        ["other", "finished"],
        ["small", "unreadable"],
    ]
    assert output.err.startswith(f"note: small is unreadable: {run}/run.json is damaged: ")
    assert main(["resume", "small", "train.steps=8"]) == 2
    assert capsys.readouterr().err.startswith(f"longstride: {run}/run.json is damaged: ")


def test_under_torchrun(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes that torchrun started agree with one, over a change of the context, and neither asks for Ray."""
    assert main(["train", "small.yaml", *GROWING]) == 0
    capsys.readouterr()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "longstride.orchestrator", "train", "small.yaml", *GROWING, "run.name=launched"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished at step 6/6") == 1
    assert "data 2 x expert 2; python-source, 2 x 64 tokens a step" in result.stdout
    assert "sequence 2 x expert 2; python-source, 1 x 128 tokens a step" in result.stdout
    launched, alone = (losses(place / "runs" / name) for name in ("launched", "small"))
    assert launched == pytest.approx(alone, rel=1e-5)


def test_characters_are_not_cut() -> None:
    class Bytes:
        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode("utf-8", errors="replace")

    text = "aé漢🎈b"
    assert list(_pieces(Bytes(), iter(text.encode()))) == list(text)  # type: ignore[arg-type]
    assert "".join(_pieces(Bytes(), iter(b"a\xe6"))) == "a\N{REPLACEMENT CHARACTER}"  # type: ignore[arg-type]
