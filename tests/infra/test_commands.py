"""Every `longstride ...` line of documentation and manifests is one that the command takes, with configs that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from longstride.orchestrator.arguments import COMMANDS
from longstride.orchestrator.parser import parse
from longstride.workers import Experiment

ROOT = Path(__file__).parent.parent.parent
TEXTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("infra/**/*.md"))]
SCRIPTS = sorted(ROOT.glob("infra/**/*.sbatch"))
_NAMES = "|".join(re.escape(command.name) for command in COMMANDS)
_COMMAND = re.compile(rf"(?:^|\s)(?:\S*/)?(?:longstride|-m longstride\.orchestrator) (?P<rest>(?:{_NAMES}) .*)$")


def code_lines(text: str) -> list[str]:
    """Lines of a text's code blocks, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def with_own_words(script: str) -> str:
    """The command of a batch script that is given no words: it sets its own."""
    text = script.replace("\\\n", " ")
    config, _, overrides = re.findall(r"^ +set -- (.*)$", text, re.MULTILINE)[0].partition(" ")
    (line,) = re.findall(r"longstride train .*$", text, re.MULTILINE)
    return line.replace('"$1"', config).replace('"${@:2}"', overrides)


def found() -> list[tuple[str, str]]:
    """(file, arguments of the command)"""
    lines = [(path, line) for path in TEXTS for line in code_lines(path.read_text())]
    lines += [(path, with_own_words(path.read_text())) for path in SCRIPTS]
    job = ROOT / "infra/kuberay/rayjob.yaml"
    lines.append((job, yaml.safe_load(job.read_text())["spec"]["entrypoint"]))
    matches = [(path.name, match["rest"]) for path, line in lines if (match := _COMMAND.search(line))]
    return [(name, rest.replace("$SLURM_JOB_NAME", "ecoli-1m")) for name, rest in matches if "..." not in rest]


def test_there_are_such_lines() -> None:
    files = {name for name, _ in found()}
    assert {"README.md", "cluster.md", "from-a-laptop-to-64-gpus.md", "rayjob.yaml", "train.sbatch"} <= files


@pytest.mark.parametrize(("file", "line"), found(), ids=lambda value: value[:60])
def test_it_is_understood(file: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = parse(shlex.split(line, comments=True))
    if not str(getattr(arguments, "config", "CONFIG")).isupper():
        number = 64 if file.endswith(".sbatch") else getattr(arguments, "workers", None)  # Slurm's launcher adds it
        workers = [f"workers={number}"] if number else []
        experiment = Experiment.load(arguments.config, [*arguments.overrides, *workers])
        assert experiment.workers == experiment.degrees.workers


def test_a_wrong_line_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"did you mean train\.steps"):
        test_it_is_understood("x.md", "train configs/quickstart.yaml train.stepz=3", monkeypatch)
    with pytest.raises(SystemExit):
        test_it_is_understood("x.md", "train configs/quickstart.yaml --adress auto", monkeypatch)


def test_python_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for path in TEXTS for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)]
    for block in blocks:
        exec(compile(block, "documentation", "exec"), {})
    assert len(blocks) >= 1 and capsys.readouterr().out
