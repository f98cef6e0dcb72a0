"""What a user can get wrong: one clear line with the fix on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longstride.orchestrator.arguments import COMMANDS
from longstride.orchestrator.cli import main

from .commands import run_command

TRAIN = ("train", "small.yaml")

# Arguments, and words that the one line must hold.
MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown command": (("trian", "small.yaml"), ("trian", "did you mean train?")),
    "missing argument": (("train",), ("CONFIG",)),
    "unknown option": (("runs", "--verify"), ("--verify",)),
    "no such config": (("train", "smal.yaml"), ("smal.yaml",)),
    "a directory as config": (("train", "."), (".", "directory")),
    "not a setting": ((*TRAIN, "steps"), ("'steps'", "key=value")),
    "misspelt key": ((*TRAIN, "train.stesp=3"), ("train.stesp", "train.steps")),
    "misspelt section": ((*TRAIN, "paralel.sequence=2"), ("paralel", "parallel")),
    "wrong type": ((*TRAIN, "train.steps=many"), ("train.steps", "many")),
    "no workers": ((*TRAIN, "workers=0"), ("workers", "0")),
    "unknown model": ((*TRAIN, "model=manba-small"), ("manba-small", "mamba-small")),
    "degrees that do not multiply": ((*TRAIN, "workers=2", "parallel.sequence=3"), ("sequence 3", "workers=3")),
    "context that does not divide": (
        (*TRAIN, "workers=3", "parallel.sequence=3", "parallel.expert=1"),
        ("data.context=128", "126", "129"),
    ),
    "batch that does not divide": ((*TRAIN, "workers=4", "parallel.data=4"), ("data.batch=2", "data.batch=4")),
    "experts that do not divide": ((*TRAIN, "workers=3", "data.context=129", "parallel.expert=3"), ("2 experts",)),
    "missing corpus": ((*TRAIN, "data.corpus=python-sorce"), ("python-sorce", "python-source")),
    "name that leaves the directory": ((*TRAIN, "run.name=../escaped"), ("run.name", "../escaped")),
    "no such run": (("resume", "smoll"), ("smoll",)),
    "no such run to generate from": (("generate", "nothing", "--prompt", "a"), ("nothing",)),
    "no such run to evaluate": (("evaluate", "nothing"), ("nothing",)),
    "no such run to list": (("checkpoints", "nothing"), ("nothing",)),
    "generate without a prompt": (("generate", "small"), ("--prompt",)),
    "bad number": (("generate", "small", "--prompt", "a", "--tokens", "x"), ("--tokens", "'x'")),
    "more workers than this machine holds": (
        (*TRAIN, "workers=4096", "parallel.sequence=2", "data.batch=2048"),
        ("workers=4096", "CPUs and", "GPUs on 1 node", "or fewer"),
    ),
    "no cluster at the address": ((*TRAIN, "--address", "127.0.0.1:1"), ("127.0.0.1:1", "refused")),
    "no address": ((*TRAIN, "--address", "nowhere"), ("nowhere", "host:port")),
    "no dashboard at the address": (("status", "--address", "http://127.0.0.1:1"), ("http://127.0.0.1:1", "refused")),
    "a dashboard without http": (("logs", "a.1", "--address", "127.0.0.1:8265"), ("127.0.0.1:8265", "http://")),
    "a dashboard's address with a password": (
        ("stop", "a.1", "--address", "http://me:hunter2@127.0.0.1:8265"),
        ("--address=http://***@127.0.0.1:8265 holds credentials", "RAY_AUTH_TOKEN"),
    ),
    "a password and no http": (
        ("status", "--address", "me:hunter2@127.0.0.1:8265"),
        ("--address=http://***@127.0.0.1:8265 holds credentials", "RAY_AUTH_TOKEN"),
    ),
    "a cluster's address with a password": (
        (*TRAIN, "--address", "me:hunter2@127.0.0.1:6379"),
        ("--address=ray://***@127.0.0.1:6379 holds credentials", "RAY_AUTH_TOKEN"),
    ),
    "submit without an address": (("submit", "small.yaml"), ("--address",)),
    "prepare nothing": (("prepare", "*.nothing", "out"), ("*.nothing",)),
    "an address of Ray Client": ((*TRAIN, "--address", "ray://head:10001"), ("ray://head:10001", "host:port")),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], words: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _main(*arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("longstride: ")
    assert captured.err.count("\n") == 1, captured.err
    assert all(word in captured.err for word in words), captured.err
    assert "Traceback" not in captured.err + captured.out
    assert "hunter2" not in captured.err + captured.out
    assert sorted(path.name for path in place.rglob("*") if path.is_file()) == ["small.yaml"]


def test_unwritable_run_directory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "taken").write_text("a file where a directory should be")
    assert _main(*TRAIN, "run.directory=taken") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run.directory=" in error
    assert "taken cannot be written" in error


def test_a_name_that_is_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs" / "small").mkdir(parents=True)
    (place / "runs" / "small" / "experiment.yaml").write_text("precious")
    assert _main(*TRAIN) == 2
    assert "longstride resume" in capsys.readouterr().err
    assert (place / "runs" / "small" / "experiment.yaml").read_text() == "precious"


def test_resume_without_a_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose checkpoint never got its manifest, as after a kill in the middle of writing."""
    assert _main(*TRAIN, "train.steps=2", "train.warmup=1") == 0
    (place / "runs/small/checkpoints/step-00000002/manifest.json").unlink()
    capsys.readouterr()
    assert _main("resume", "runs/small", "train.steps=4") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no complete checkpoint" in error


def test_the_real_command(place: Path) -> None:
    """The same through the installed program, and with the traceback when asked for."""
    outcome = run_command(*TRAIN, "train.stesp=3", directory=place)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.count("\n") == 1
    assert "did you mean train.steps?" in outcome.stderr
    outcome = run_command(*TRAIN, "train.stesp=3", directory=place, LONGSTRIDE_TRACEBACK="1")
    assert outcome.code == 2
    assert "Traceback" in outcome.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_has_an_example(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    name = getattr(command, "name", "")
    assert _main(name, "--help") == 0
    assert f"longstride {name} " in capsys.readouterr().out.partition("Example:")[2]


def test_help_does_not_wait_for_torch() -> None:
    source = (
        "import sys\nfrom longstride.orchestrator.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, env=os.environ)


def test_overrides_may_follow_options(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse alone refuses the second half of these."""
    assert _main("train", "small.yaml", "seed=1", "--address", "nowhere", "train.stesp=3") == 2
    assert "train.stesp" in capsys.readouterr().err


def _main(*arguments: str) -> int:
    """The command's exit code, in this process."""
    try:
        return main(arguments)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
