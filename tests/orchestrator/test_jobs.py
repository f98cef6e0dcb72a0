"""What a job carries, and what a person is told, as far as it needs no cluster."""

from __future__ import annotations

import base64
import hashlib
import http.server
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from longstride.data import open_corpus
from longstride.orchestrator.cli import main
from longstride.orchestrator.jobs import job_environment, pack
from longstride.orchestrator.wheel import ROOMS, build_wheel, package_files
from longstride.workers import Experiment

from .commands import losses

ROOT = Path(__file__).parents[2]


def test_the_wheel_is_exactly_this_code(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    (tmp_path / "again").mkdir()
    assert build_wheel(tmp_path / "again").read_bytes() == wheel.read_bytes(), "a cluster's cache would miss it"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {f"longstride/{room}/{file}" for room in ROOMS for file in sources(room)} <= names
        assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
        about = next(name for name in names if name.endswith("RECORD"))
        for line in archive.read(about).decode().splitlines():
            name, digest, size = line.rsplit(",", 2)
            if name != about:
                content = archive.read(name)
                assert len(content) == int(size)
                expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert digest == f"sha256={expected}"
        assert b"Requires-Dist" not in archive.read(about.replace("RECORD", "METADATA"))


def sources(room: str) -> list[str]:
    return [path.relative_to(ROOT / room).as_posix() for path in (ROOT / room).rglob("*.py")]


def test_the_code_decides_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "changed.py"
    other.write_text("changed = True\n")
    before = build_wheel(tmp_path).name
    files = package_files() | {"longstride/workers/changed.py": other}
    monkeypatch.setattr("longstride.orchestrator.wheel.package_files", lambda: files)
    assert build_wheel(tmp_path).name != before


def test_a_process_of_the_job_runs_the_code_it_brought(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Even where longstride is installed, as it is here."""
    directory = tmp_path_factory.mktemp("job")
    pack(Experiment.load("small.yaml"), directory)
    assert Experiment.load(str(directory / "experiment.yaml")).run.name == "small"
    code = (
        "import longstride.orchestrator, longstride.data, importlib.metadata as m; "
        "print(longstride.orchestrator.__file__, longstride.data.__file__, m.version('longstride'), sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True, text=True, check=True)
    orchestrator, data, version = result.stdout.splitlines()
    assert Path(orchestrator).is_relative_to(directory)
    assert Path(data).is_relative_to(directory)
    assert "+code." in version


def test_a_job_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hidden")
    assert "hidden" not in job_environment().values()


@pytest.fixture
def stranger() -> Iterator[str]:
    """A web server that is no dashboard."""
    handler = type("Quiet", (http.server.BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_is_no_dashboard(place: Path, stranger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--address", stranger]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{stranger} does not answer as a Ray dashboard" in error


def test_prepare_and_train_on_it(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "texts").mkdir()
    for number in range(40):
        (place / "texts" / f"{number}.txt").write_text(f"Text {number} is a text of a few words.\n" * 20)
    assert main(["prepare", "texts", "corpus", "--tokenizer", "bytes", "--validation", "0.2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("prepared corpus: ")
    assert captured.out.endswith("train on it: data.corpus=corpus model.vocab_size=256\n")
    corpus = open_corpus("corpus")
    assert corpus.num_tokens("train") > 3 * corpus.num_tokens("validation") > 0

    assert main(["train", "small.yaml", "data.corpus=corpus"]) == 0
    assert len(losses(place / "runs" / "small")) == 6
    sent = Experiment.load("small.yaml", ["data.corpus={corpus: 2, python-source: 1}"])
    assert sent.data.corpus == {str(place / "corpus"): 2, "python-source": 1}, "a job has another current directory"
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("/")
        assert main(["generate", str(place / "runs" / "small"), "--prompt", "a", "--tokens", "2"]) == 0, "and so may we"
    capsys.readouterr()
    assert main(["train", "small.yaml", "data.corpus=texts"]) == 2
    assert "run `longstride prepare " in (error := capsys.readouterr().err) and error.endswith("give data.corpus=OUT\n")

    assert main(["prepare", "texts", "corpus", "--tokenizer", "dna"]) == 2
    assert "take another folder, or overwrite it" in capsys.readouterr().err
    assert main(["prepare", "texts", "other", "--tokenizer", "byts"]) == 2
    assert "did you mean 'bytes'?" in capsys.readouterr().err


def test_a_job_started_again_goes_on_with_its_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["train", "small.yaml", "--continue"]
    assert main(again) == 0
    reference = losses(place / "runs" / "small")
    assert main(again) == 0
    assert "has made all its 6 steps" in capsys.readouterr().out
    checkpoints = place / "runs" / "small" / "checkpoints"
    for step in (6, 4):  # as if the driver had been lost between steps 2 and 4
        (checkpoints / f"step-{step:08d}" / "manifest.json").unlink()
    assert main(again) == 0
    assert losses(place / "runs" / "small") == reference
    for manifest in checkpoints.glob("*/manifest.json"):  # and before the first checkpoint
        manifest.unlink()
    assert main(again) == 0
    assert losses(place / "runs" / "small") == reference
    assert main([*again, "train.steps=8"]) == 0, "what the config says now counts"
    assert len(losses(place / "runs" / "small")) == 8
    assert main([*again, "seed=4", "train.steps=10"]) == 2
    assert "seed cannot change" in capsys.readouterr().err
