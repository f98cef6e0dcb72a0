"""Run directories and the metrics log, on a disk and on an object store (fsspec's memory file system)."""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from longstride.workers import metrics
from longstride.workers.configuration import ConfigError, validate
from longstride.workers.metrics import METRICS_FILE, MetricsLog, StepRecord, newest_records, read_records
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


@pytest.mark.parametrize("block", [7, 100, 1 << 16])
def test_a_log_is_read_from_its_end(place: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks shorter than a line and longer than the log, over several files, with the last line torn."""
    monkeypatch.setattr(metrics, "READ_BYTES", block)
    storage = Storage(f"{place}/log")
    assert list(newest_records(storage)) == []
    lines = [record(step).to_json() + "\n" for step in range(1, 11)]
    storage.write_text(METRICS_FILE, "".join(lines[:6]))
    storage.write_text("metrics-0001.jsonl", "".join(lines[6:]) + lines[0][:20])
    assert list(newest_records(storage)) == list(read_records(storage))[::-1]
    assert next(newest_records(storage)).step == 10


def test_the_end_of_a_long_log_is_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    line = record(1).to_json() + "\n"
    storage.write_text(METRICS_FILE, line * (5 * metrics.READ_BYTES // len(line)))
    parsed: list[str] = []
    parse = metrics._complete
    monkeypatch.setattr(metrics, "_complete", lambda text: parsed.append(text) or parse(text))
    assert next(newest_records(storage)) == record(1)
    assert sum(map(len, parsed)) < 2 * len(line)


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
    run.metrics.flush()
    assert len(writes) <= 2, "a first that is not waited for, and all of them"
    assert writes[-1].count("\n") == 100


def written(storage: Storage, steps: range, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that go to the store while the steps are made, the log flushed after each."""
    log, sent, write = MetricsLog(storage), [0], Storage.write_text

    def counted(self: Storage, name: str, text: str) -> None:
        sent[0] += len(text)
        write(self, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write_text", counted)
        for step in steps:
            log.append(record(step))
            log.flush()
    return sent[0]


def test_what_an_object_store_is_sent_grows_with_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In files of at most ten lines, a log that is twice as long takes twice the bytes; in one file, four times."""
    line, sent = len(record(100).to_json()) + 1, {}
    for most, name in ((10 * line - 20, "files"), (10**9, "file")):
        monkeypatch.setattr(metrics, "FILE_BYTES", most)
        storage = Storage(f"memory://{tmp_path.name}/{name}")
        first, second = (written(storage, steps, monkeypatch) for steps in (range(1, 201), range(201, 401)))
        sent[name] = second / first
        assert [found.step for found in read_records(storage)] == list(range(1, 401))
        assert list(read_records(storage, after=390)) == list(read_records(storage))[390:]
    assert len(metrics.log_files(Storage(f"memory://{tmp_path.name}/files"))) >= 40
    assert sent["files"] < 1.1 and sent["file"] > 2.9


def test_a_log_of_many_files_is_rewound_from_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metrics, "FILE_BYTES", 1000)
    storage = Storage(f"memory://{tmp_path.name}/run")
    written(storage, range(1, 41), monkeypatch)
    names = metrics.log_files(storage)
    assert names[:2] == [METRICS_FILE, "metrics-0001.jsonl"] and len(names) > 5
    again = MetricsLog(storage)
    assert again.rewind(25) == 15
    left = metrics.log_files(storage)
    assert 1 < len(left) < len(names)
    for step in range(26, 61):
        again.append(record(step, 9.0))
        again.flush()
    assert [(found.step, found.loss) for found in read_records(storage)] == [
        (step, 2.0 if step <= 25 else 9.0) for step in range(1, 61)
    ]
    remove, gone = Storage.remove, list[str]()

    def interrupted(self: Storage, name: str) -> None:
        if len(gone) == 2:
            raise KeyboardInterrupt
        gone.append(name)
        remove(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Storage, "remove", interrupted)
        MetricsLog(storage).rewind(0)
    steps = [found.step for found in read_records(storage)]
    assert 1 < len(steps) < 60 and steps == list(range(1, len(steps) + 1)), "no gap"
    assert MetricsLog(storage).rewind(0) == len(steps)
    assert metrics.log_files(storage) == [METRICS_FILE] and list(read_records(storage)) == []


def test_times_grow_though_the_clock_is_put_back(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the next start, which takes the last steps back."""
    run, clock = RunDirectory.create(place, "clock", ""), [1e6]
    monkeypatch.setattr(metrics.time, "time", lambda: clock[0])
    for step in range(1, 5):
        run.metrics.append(replace(record(step), time=run.metrics.now()))
        clock[0] -= 3600 if step == 2 else -1
    run.metrics.flush()
    times = [found.time for found in read_records(run.storage)]
    assert times == sorted(times) and times[1:3] == [1e6 + 1, 1e6 + 1.001]
    resumed = RunDirectory(run.url)
    resumed.metrics.rewind(2)
    assert resumed.metrics.now() > times[-1]
    clock[0] = 1e6 + 10
    assert resumed.metrics.now() == clock[0]


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
