"""What a user can get wrong: one clear line with the fix on stderr, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longstride.models.interchange.layouts import LAYOUTS
from longstride.orchestrator import commands
from longstride.orchestrator.arguments import COMMANDS, Command
from longstride.orchestrator.arguments import LAYOUTS as LISTED_LAYOUTS
from longstride.orchestrator.cli import ECHO_SECONDS, main
from longstride.orchestrator.failures import EchoOfMistake, failure
from longstride.orchestrator.parser import parse
from longstride.workers import Experiment
from longstride.workers.evaluate import unfit_lengths
from longstride.workers.launch import check

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
    "misspelt key": ((*TRAIN, "train.stesp=3"), ("train.stesp", "train.steps", "`longstride settings train`")),
    "misspelt option of a mixer": (
        (*TRAIN, "model.mamba.stat=3"),
        ("model.mamba.stat;", "model.mamba.state?", "`longstride settings model.mamba`"),
    ),
    "misspelt option in a plan": (
        (*TRAIN, "model.layers='[mamba(stat=3)]'"),
        ("'mamba.stat'", "'state'", "`longstride settings model.mamba`"),
    ),
    "a plan that YAML cannot read": (
        (*TRAIN, "model.layers=[mamba] x 2"),
        ("not valid YAML", "write 'model.layers=\"[mamba] x 2\"'"),
    ),
    "not one of the choices": (("communication", "small", "--by", "hour"), ("no --by 'hour'", "motion, layer, rank")),
    "no such preset": (("presets", "manba-small"), ("manba-small", "mamba-small")),
    "no such setting": (("settings", "parralel"), ("parralel", "did you mean parallel?")),
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
    "prepare with nobody": (("prepare", "small.yaml", "out", "--workers", "0"), ("workers must be at least 1, not 0",)),
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


def test_a_run_that_cannot_be_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another version, whose settings have other names, or damaged: the file is named."""
    run = place / "runs" / "small"
    run.mkdir(parents=True)
    settings = (place / "small.yaml").read_text()
    (run / "run.json").write_text('{"name": "small", "code_version": "0.0.9"}')
    (run / "experiment.yaml").write_text(settings + "optimiser: {rate: 1}\n")
    assert _main("generate", "small", "--prompt", "a") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"longstride: {run}/experiment.yaml, written by 0.0.9 (this is ")
    assert "unknown setting optimiser;" in error and error.count("\n") == 1
    (run / "experiment.yaml").write_bytes(b"\x99\xff")
    assert _main("resume", "small") == 2
    assert capsys.readouterr().err == f"longstride: {run}/experiment.yaml is not a text file\n"


def test_an_empty_source_is_not_a_missing_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty.txt").touch()
    assert _main("prepare", "empty.txt", "out") == 2
    assert capsys.readouterr().err == "longstride: nothing is in empty.txt: 1 empty file\n"


def test_memory_that_is_not_there() -> None:
    told = str(failure("RuntimeError", "DefaultCPUAllocator: can't allocate memory: 9 bytes", "", "worker 1"))
    assert told.startswith("worker 1 failed: out of memory: take more workers") and told.endswith("9 bytes)")
    assert str(failure("RuntimeError", "shapes differ", "")) == "RuntimeError: shapes differ"


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


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_can_be_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the repository's own configs, as far as they need no run or cluster."""
    monkeypatch.chdir(Path(__file__).parents[2])
    arguments = parse(shlex.split(command.example)[1:])
    words = [*getattr(arguments, "overrides", [])]
    if command.name in ("train", "submit", "plan", "evaluate"):
        if command.name == "plan":
            words.append(f"workers={arguments.workers}")
        experiment = Experiment.load(getattr(arguments, "config", "configs/quickstart.yaml"), words)
        check(experiment)
        assert unfit_lengths(experiment) is None
    elif command.name in ("presets", "settings"):
        assert getattr(commands, command.name)(arguments) == 0


def test_the_help_of_export_names_the_layouts() -> None:
    """By a list of its own, as it does not wait for torch."""
    assert set(LAYOUTS) == set(LISTED_LAYOUTS.split(", "))


def test_help_does_not_wait_for_torch() -> None:
    source = (
        "import sys\nfrom longstride.orchestrator.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, env=os.environ)


@pytest.mark.parametrize(("own", "line"), [("it is gone", "longstride: process 3: it is gone\n"), ("", "")])
def test_the_first_process_speaks(
    own: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends all processes with the first that fails: the others wait, and speak where it knew nothing."""
    waits: list[float] = []

    def echo(arguments: object) -> int:
        raise EchoOfMistake(own)

    monkeypatch.setattr(commands, "runs", echo)
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) or capsys.readouterr())
    monkeypatch.setenv("RANK", "3")
    assert _main("runs") == 2
    assert capsys.readouterr().err == line and waits == [ECHO_SECONDS]


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
