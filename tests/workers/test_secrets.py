"""No secret in what a run writes or prints; nothing that a config or a checkpoint names leaves its place."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from torch.distributed.checkpoint.metadata import Metadata

from longstride.data import prepare
from longstride.data.credentials import mask_credentials, refuse_credentials
from longstride.data.object_store import PatientS3FileSystem
from longstride.data.storage import Folder
from longstride.orchestrator.cli import main
from longstride.orchestrator.jobs import check_address
from longstride.workers import Experiment, create_run, find_run, list_runs
from longstride.workers.checkpoint_policy import prune
from longstride.workers.configuration import ConfigError, apply_overrides, parse_yaml
from longstride.workers.dcp_storage import RestrictedReader
from longstride.workers.interchange import export_run, imported_experiment
from longstride.workers.manifest import MANIFEST_FILE, Checkpoint, list_checkpoints
from longstride.workers.metrics import read_records
from longstride.workers.run_directory import RunDirectory
from longstride.workers.storage import Storage

from ..distributed import run_ranks
from ..faults.conftest import SECRET
from ..faults.conftest import server as server
from ..faults.conftest import store as store
from ..faults.proxy import FaultProxy
from ..orchestrator.commands import CONFIG, finish, run_command, start_command
from ..orchestrator.nodes import wait_until
from .test_checkpoint import save_two_steps
from .tiny import tiny_experiment

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": "a-token-that-shows-nowhere",
    "MLFLOW_TRACKING_USERNAME": "a-user-that-shows-nowhere",
    "MLFLOW_TRACKING_PASSWORD": "a-password-that-shows-nowhere",
}


def test_a_run_on_s3_writes_and_prints_no_secret(store: FaultProxy, tmp_path: Path) -> None:
    """Run directory, tracker's database and artifacts, and all that the command prints, its traceback included."""
    (tmp_path / "small.yaml").write_text(CONFIG + "run: {directory: s3://bucket/runs, name: small}\n")
    words = ("train", "small.yaml", "tracking.enabled=true", "tracking.patience=120")
    outcome = run_command(*words, directory=tmp_path, LONGSTRIDE_TRACEBACK="1", **SECRETS)
    assert outcome.code == 0, outcome.stderr
    written = {"stdout": outcome.stdout.encode(), "stderr": outcome.stderr.encode()}
    PatientS3FileSystem.clear_instance_cache()
    remote = fsspec.filesystem("s3")
    remote.invalidate_cache()
    written |= {name: remote.cat_file(name) for name in remote.find("bucket")}
    written |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = " ".join(written)
    assert all(part in names for part in ("manifest.json", "metrics.jsonl", "mlflow.db")), names
    for name, content in written.items():
        for secret in SECRETS.values():
            assert secret.encode() not in content, f"{name} holds a secret"


@pytest.mark.parametrize("value", ["!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system"])
def test_yaml_that_would_run_code_is_one_line(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        parse_yaml(f"seed: {value}\n", "bad.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not valid YAML"):
        apply_overrides({}, [f"seed={value}"])
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["../up", "/tmp/absolute", "a/../../b", "..", "~root"])
def test_a_name_that_leaves_the_run_directory_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.name"):
        RunDirectory.create(str(tmp_path), name, "")
    with pytest.raises(ValueError, match="not a checkpoint's name"):
        Checkpoint(RunDirectory(str(tmp_path)), name)
    assert list(tmp_path.iterdir()) == []


def test_a_run_does_not_follow_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"run\.name=tiny is a link out of") as caught:
        create_run(tiny_experiment(str(tmp_path / "runs")))
    assert "\n" not in str(caught.value)
    assert list(elsewhere.iterdir()) == []


def test_a_checkpoint_does_not_lead_out_of_its_directory(tmp_path: Path) -> None:
    """By a manifest, by DCP's own metadata, or by a link in its place."""
    run_ranks(save_two_steps, 1, str(tmp_path))
    run = RunDirectory(str(tmp_path / "tiny"))
    (checkpoint,) = list_checkpoints(run)
    place, outside = Path(checkpoint.storage.root), tmp_path / "outside"

    shutil.copytree(place, outside)
    (place.parent / "step-00000001").symlink_to(outside)
    assert [found.name for found in list_checkpoints(run)] == [checkpoint.name]
    assert prune(run, 1) == []
    assert (outside / MANIFEST_FILE).exists()

    metadata: Metadata = RestrictedReader(checkpoint.storage).read_metadata()
    assert metadata.storage_data is not None
    moved = {
        key: replace(info, relative_path="../../../outside/__0_0.distcp") for key, info in metadata.storage_data.items()
    }
    (place / ".metadata").write_bytes(pickle.dumps(replace(metadata, storage_data=moved)))
    with pytest.raises(pickle.UnpicklingError, match="points outside of it"):
        RestrictedReader(checkpoint.storage).read_metadata()

    manifest = json.loads((place / MANIFEST_FILE).read_text())
    manifest["files"]["../../../outside/__0_0.distcp"] = manifest["files"]["__0_0.distcp"]
    (place / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert checkpoint.problems() == [
        "manifest.json names a file outside of the checkpoint, ../../../outside/__0_0.distcp"
    ]


# Every kind of URL that holds a secret, and what is shown of it.
SECRET_URLS = {
    "s3://AKIAKEY:hunter2@bucket/corpus": "s3://***@bucket/corpus",
    "s3://AKIAKEY:hun/ter2@bucket/corpus": "s3://***@bucket/corpus",  # AWS's secrets hold slashes
    "https://hunter2@host/corpus": "https://***@host/corpus",
    "simplecache::s3://key:hunter2@bucket/c": "simplecache::s3://***@bucket/c",
    "abfs://container:hunter2@account/c": "abfs://***@account/c",
    "https://host/c?versionId=3&X-Amz-Signature=hunter2": "https://host/c?versionId=3&X-Amz-Signature=***",
    "https://host/c?X-Amz-Security-Token=hunter2&x=1": "https://host/c?X-Amz-Security-Token=***&x=1",
    "s3://bucket/c?secret=hunter2": "s3://bucket/c?secret=***",
    "https://host/c?token=hunter2": "https://host/c?token=***",
    "https://account.blob/c?sv=2026&sig=hunter2": "https://account.blob/c?sv=2026&sig=***",
    "https://host/c?AWSAccessKeyId=hunter2": "https://host/c?AWSAccessKeyId=***",
    "https://host/c#access_token=hunter2": "https://host/c#access_token=***",
}
CLEAN_URLS = (
    "s3://bucket/we@ird/c",
    "abfs://container@account.dfs.core.windows.net/c",
    "http://127.0.0.1:5000/a@b",
    "sqlite:////home/a@b.db",
    "https://host/c?versionId=3&author=me&tokens=8&design=4&monkey=1",
)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_secret_in_a_url_is_found_and_masked(url: str) -> None:
    shown = SECRET_URLS[url]
    assert mask_credentials(f"cannot read '{url}' there") == f"cannot read '{shown}' there"
    assert mask_credentials(shown) == shown
    with pytest.raises(ValueError, match="holds credentials") as caught:
        Folder(url)
    assert "hun" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("url", CLEAN_URLS)
def test_a_url_without_a_secret_is_left_alone(url: str) -> None:
    assert refuse_credentials("data.corpus", url) == url
    assert mask_credentials(url) == url


BAD, SIGNED = "s3://AKIAKEY:hunter2@bucket/corpus", "https://host/corpus?X-Amz-Signature=hunter2"


@pytest.mark.parametrize("url", [BAD, SIGNED])
@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("data.corpus", "data.corpus={}"),
        ("data.corpus", "data.corpus={{python-source: 1, '{}': 2}}"),
        ("run.directory", "run.directory={}"),
        ("tracking.uri", "tracking.uri={}"),
    ],
)
def test_a_setting_with_a_secret_is_one_line(field: str, word: str, url: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=\S*\*\*\*.* holds credentials: .* set .* instead$") as caught:
        tiny_experiment("/nowhere", word.format(url))
    assert "hunter2" not in str(caught.value) and "AKIAKEY" not in str(caught.value)


@pytest.mark.parametrize("word", ["data.corpus={{'{}': much}}", "data.corpus=['{}']", "data.{}=1", "{}"])
def test_no_other_mistake_repeats_a_secret(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_experiment("/nowhere", word.format(BAD))
    assert "s3://***" in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", [BAD, SIGNED])
def test_a_command_does_not_take_a_url_with_a_secret(url: str, tmp_path: Path) -> None:
    """Every argument that may be a URL, by its name in the command's help."""
    source = tmp_path / "a.txt"
    source.write_text("text")
    commands: dict[str, Callable[[], object]] = {
        "RUN": lambda: find_run(url),
        "--directory": lambda: list_runs(url),
        "CONFIG": lambda: Experiment.load(url),
        "OUT": lambda: prepare(str(source), url),
        "SOURCE": lambda: prepare([str(source), url], str(tmp_path / "out")),
        "--tokenizer": lambda: prepare(str(source), str(tmp_path / "out"), tokenizer=f"{url}/tokenizer.json"),
        "URL": lambda: Storage(f"{url}/step-00000001"),
        "--address": lambda: check_address(url),
    }
    for field, command in commands.items():
        with pytest.raises(ValueError, match=rf"\b{field.strip('-')}=\S*\*\*\*.* holds credentials") as caught:
            command()
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^OUT=\S* holds credentials"):
        imported_experiment(str(tmp_path), url)
    with pytest.raises(ValueError, match=r"^OUT=\S* holds credentials"):
        export_run(RunDirectory(str(tmp_path)), tiny_experiment("/nowhere"), url, "mamba")
    assert not (tmp_path / "out").exists(), "refused before anything is made"


@pytest.mark.parametrize("words", [("train", "no.yaml", BAD), ("train", BAD), ("checkpoints", BAD)])
def test_the_command_line_never_repeats_a_secret(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGSTRIDE_TRACEBACK", "1")
    assert main(words) == 2
    assert "hunter2" not in "".join(capsys.readouterr())


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_over_ray_keeps_its_secrets_from_rays_files(store: FaultProxy, tmp_path: Path) -> None:
    """Sockets, logs and all else below Ray's session directory, which goes with the run: looked at while it trains."""
    (tmp_path / "small.yaml").write_text(CONFIG + "run: {directory: s3://bucket/runs, name: small}\n")
    words = ("train", "small.yaml", "workers=2", "train.steps=1000000", "tracking.enabled=true", "checkpoint.every=3")
    with tempfile.TemporaryDirectory(prefix="ls-") as temporary:  # short: Ray's sockets have long names
        process = start_command(*words, directory=tmp_path, TMPDIR=temporary, **SECRETS)
        try:
            run = RunDirectory("s3://bucket/runs/small")
            wait_until(lambda: run.exists() and len(list(read_records(run.storage))) >= 6, "step 6", timeout=200)
            written = {str(path): path.read_bytes() for path in Path(temporary).rglob("*") if path.is_file()}
        finally:
            os.killpg(process.pid, signal.SIGINT)
            outcome = finish(process)
    assert outcome.code == 130, outcome.stderr
    assert any("worker" in name and name.endswith(".err") for name in written), sorted(written)
    assert any("raylet" in name for name in written)
    assert any(temporary.encode() in content for content in written.values()), "what is in them is looked at"
    for name, content in {**written, "stdout": outcome.stdout.encode(), "stderr": outcome.stderr.encode()}.items():
        for secret in SECRETS.values():
            assert secret.encode() not in content, f"{name} holds a secret"
