"""No secret in what a run writes or prints; nothing that a config or a checkpoint names leaves its place."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from torch.distributed.checkpoint.metadata import Metadata

from longstride.data.object_store import PatientS3FileSystem
from longstride.workers import create_run
from longstride.workers.configuration import ConfigError, apply_overrides, parse_yaml
from longstride.workers.dcp_storage import RestrictedReader
from longstride.workers.manifest import MANIFEST_FILE, Checkpoint, list_checkpoints, prune
from longstride.workers.run_directory import RunDirectory

from ..distributed import run_ranks
from ..faults.conftest import SECRET
from ..faults.conftest import moto as moto
from ..faults.conftest import store as store
from ..faults.proxy import FaultProxy
from ..orchestrator.commands import CONFIG, run_command
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


def test_a_url_with_credentials_is_refused_without_repeating_them() -> None:
    for words in (["run.directory=s3://key:hunter2@bucket/runs"], ["tracking.uri=https://me:hunter2@host"]):
        with pytest.raises(ConfigError, match="holds credentials") as caught:
            tiny_experiment("/nowhere", *words)
        assert "hunter2" not in str(caught.value)
