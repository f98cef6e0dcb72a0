"""Run directories and the metrics log, on a disk and on an object store (fsspec's memory file system)."""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from longstride.workers import metrics
from longstride.workers.configuration import ConfigError, validate
from longstride.workers.metrics import METRICS_FILE, StepRecord, read_records
from longstride.workers.run_directory import RunConfig, RunDirectory, check_name, code_version, find_run, list_runs
from longstride.workers.storage import Storage


def record(step: int, loss: float = 2.0) -> StepRecord:
    return StepRecord(step, loss, None, step * 64, 1e4, 0.1, 2**30, 1e-3, 0.5, 0.01, 0.0, 1000.0 + step)


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "runs") if request.param == "disk" else f"memory://{tmp_path.name}"
    Storage(f"memory://{tmp_path.name}").remove("")


def test_create_find_list(place: str) -> None:
    run = RunDirectory.create(place, "first", "workers: 1\n", extra=3)
    assert run.read_experiment() == "workers: 1\n"
    info = run.read_info()
    assert (info["name"], info["parents"], info["extra"]) == ("first", [], 3)
    assert info["code_version"].startswith("0.")
    run.record_start(step=5, workers=2)
    assert run.read_info()["starts"][0]["step"] == 5
    assert [found.name for found in list_runs(place)] == ["first"]
    assert find_run("first", place).url == find_run(run.url).url == run.url
    if "://" not in place:  # one name for one place: MLflow's store is found by it
        assert find_run("first", f"{place}/../{Path(place).name}").url == run.url
    with pytest.raises(ValueError, match="did you mean first"):
        find_run("firts", place)
    with pytest.raises(ValueError, match="`longstride runs --directory memory://elsewhere` lists"):
        find_run("memory://elsewhere/first")
    with pytest.raises(ValueError, match=r"exists already.*longstride resume"):
        RunDirectory.create(place, "first", "")


def test_no_runs_yet(place: str) -> None:
    assert list_runs(place) == []
    with pytest.raises(ValueError, match="holds no runs"):
        find_run("any", place)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.directory=.*file cannot be written: Not a directory") as caught:
        RunDirectory.create(str(tmp_path / "file"), "name", "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden", "", "a b", "x" * 200, "a..b"])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.name"):
        check_name(name)
    with pytest.raises(ValueError, match=r"run\.name"):
        RunConfig(name=name)


def test_credentials_are_refused_wherever_settings_are_written() -> None:
    with pytest.raises(ConfigError, match=r"holds credentials.*AWS_ACCESS_KEY_ID") as caught:
        validate(RunConfig, {"directory": "s3://key:hunter2@bucket/runs"})
    assert "hunter2" not in str(caught.value)


def test_metrics_are_appended_and_read_back(place: str) -> None:
    run = RunDirectory.create(place, "metrics", "")
    records = [record(step, 2.0 / 3.0 / step) for step in range(1, 6)]
    for item in records:
        run.metrics.append(item)
    run.metrics.flush()
    assert list(read_records(run.storage)) == records
    assert list(read_records(run.storage, after=3)) == records[3:]
    lines = run.storage.read_text(METRICS_FILE).splitlines()
    assert json.loads(lines[0])["loss"] == records[0].loss  # every bit of it


def test_rewind_takes_back_later_steps_and_torn_lines(place: str) -> None:
    run = RunDirectory.create(place, "rewound", "")
    for step in range(1, 6):
        run.metrics.append(record(step))
    run.metrics.flush()
    run.storage.write_text(METRICS_FILE, run.storage.read_text(METRICS_FILE) + '{"step": 6, "lo')
    resumed = RunDirectory(run.url)
    assert resumed.metrics.rewind(3) == 2
    resumed.metrics.append(record(4, 9.0))
    resumed.metrics.flush()
    assert [(item.step, item.loss) for item in read_records(run.storage)] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 9.0)]


def test_a_line_on_disk_is_there_at_once(tmp_path: Path) -> None:
    run = RunDirectory.create(str(tmp_path), "run", "")
    run.metrics.append(record(1))
    assert (tmp_path / "run" / METRICS_FILE).read_text().count("\n") == 1


def test_an_object_store_is_not_rewritten_at_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = RunDirectory.create(f"memory://{tmp_path.name}", "run", "")
    writes = []
    monkeypatch.setattr(Storage, "write_text", lambda self, name, text: writes.append(text))
    monkeypatch.setattr(metrics, "REWRITE_INTERVAL", 3600.0)
    for step in range(1, 101):
        run.metrics.append(record(step))
    assert len(writes) == 1
    run.metrics.flush()
    assert len(writes) == 2
    assert writes[-1].count("\n") == 100


def test_a_loss_that_is_no_number_is_still_json() -> None:
    line = replace(record(1), loss=float("nan")).to_json()
    assert json.loads(line)["loss"] is None
    assert StepRecord.from_dict(json.loads(line)).loss != StepRecord.from_dict(json.loads(line)).loss


def test_the_rooms_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a network they may only lie on the path."""

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert code_version.__wrapped__().startswith("uninstalled")
