"""The directory of one run, at any fsspec URL (a path, s3://bucket/runs, memory://runs).

experiment.yaml     the resolved settings
run.json            name, MLflow run id, parents, code version, who writes the run, one entry for every start
metrics.jsonl       one object a step; on an object store others follow it (see metrics.py)
tokenizer.json      what token ids mean, with tokenizer_config.json beside it (see run_tokenizer.py)
checkpoints/        step-00000200/ and so on (see checkpoint.py)
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import secrets
import socket
import subprocess
import threading
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import field_validator

from ..data.credentials import refuse_credentials
from ..data.storage import check_url
from .configuration import ConfigError, Settings
from .metrics import MetricsLog
from .storage import Storage, StorageError

EXPERIMENT_FILE = "experiment.yaml"
INFO_FILE = "run.json"
# On an object store, how often (seconds) it is asked whether somebody else has taken the run; less often, to keep the
# asking to this share of the time, while it answers slowly or not at all.
OWNER_INTERVAL = 10.0
OWNER_SHARE = 0.05
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class RunConfig(Settings):
    """Where a run is kept.

    Attributes:
        directory: path or URL below which every run has its own directory.
        name: the run's name; from the config's name and the time (UTC) when not given.
    """

    directory: str = "runs"
    name: str | None = None

    @field_validator("name", mode="before")
    @classmethod
    def _name_stays_inside(cls, name: Any) -> str | None:
        return None if name is None else check_name(str(name))

    @field_validator("directory")
    @classmethod
    def _directory_is_complete_and_holds_no_secret(cls, directory: str) -> str:
        if not directory:
            raise ValueError("run.directory is empty; give a path or a URL")
        if "://" not in check_url(directory):
            # Processes that a cluster starts have other current directories.
            return str(Path(directory).expanduser().absolute())
        return refuse_credentials("run.directory", directory)


class RunTaken(Exception):
    """Somebody else writes the run since; the message is one line. Whoever meets it stops, and writes nothing more."""


class RunDirectory:
    """One run's directory. Opening it does not touch the file system; `create` does.

    A run has one writer: whoever took it last. `token`: with which it was taken, by `take` or by the process that
    started this one; None writes unasked.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.storage = Storage(url)
        self.token = token
        self._owner_seen: int | None = None  # the file as it was when its owner was looked at
        self._owner_due = -math.inf  # when to look again, on an object store
        self._looking: threading.Thread | None = None
        self._taken = False
        self.name = self.storage.url.rsplit("/", 1)[-1]
        self.metrics = MetricsLog(self.storage)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.storage.url

    @classmethod
    def create(cls, directory: str, name: str, experiment_yaml: str, **info: Any) -> RunDirectory:
        """Makes `directory/name` with experiment.yaml and run.json.

        Raises ValueError when the run exists already or the place cannot be written.
        """
        run = cls(f"{directory.rstrip('/')}/{check_name(name)}")
        try:
            if run.exists():
                raise ValueError(
                    f"run.name={name} exists already in {directory}: continue it with `longstride resume {run.url}` "
                    "or choose another run.name"
                )
            if run.storage.local and Path(run.url).is_symlink():
                raise ValueError(f"run.name={name} is a link out of {directory}: choose another run.name")
            run.storage.make()
            created = {"name": name, "created": timestamp(), "code_version": code_version(), "parents": []}
            run.storage.write_text(INFO_FILE, json.dumps(created | info, indent=2) + "\n")
            run.storage.write_text(EXPERIMENT_FILE, experiment_yaml)
        except ValueError:
            raise
        except Exception as error:  # every file system has its own family of errors
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0] or type(error).__name__
            raise ValueError(
                f"run.directory={directory} cannot be written: {reason}; choose another with run.directory=PATH"
            ) from error
        return run

    def exists(self) -> bool:
        return self.storage.exists(EXPERIMENT_FILE)

    def read_experiment(self) -> str:
        """The text of experiment.yaml. ConfigError: it is none."""
        try:
            return self.storage.read_text(EXPERIMENT_FILE)
        except UnicodeDecodeError:
            raise ConfigError(f"{self.url}/{EXPERIMENT_FILE} is not a text file") from None

    def write_experiment(self, text: str) -> None:
        self.storage.write_text(EXPERIMENT_FILE, text)

    def read_info(self) -> dict[str, Any]:
        """The content of run.json; empty when there is none. ValueError: it is damaged."""
        try:
            return json.loads(self.storage.read_text(INFO_FILE))
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.url}/{INFO_FILE} is damaged: {error}") from None

    def update_info(self, **values: Any) -> None:
        """Sets keys of run.json. One process writes it (rank 0); its threads may."""
        with self._lock:
            self.storage.write_text(INFO_FILE, json.dumps(self.read_info() | values, indent=2) + "\n")

    def take(self) -> str:
        """Makes this process, and those that it gives the token, the run's writer in the place of any other."""
        self.token, self._taken = secrets.token_hex(8), False
        self.update_info(owner={"token": self.token, "time": timestamp(), "host": socket.gethostname()})
        return self.token

    def give_back(self) -> None:
        """Its writer is done with the run, and stays the last; whoever has taken it meanwhile keeps it."""
        owner = self.read_info().get("owner")
        if owner is not None and owner["token"] == self.token:
            self.update_info(owner=owner | {"given_back": timestamp()})

    def check_owner(self) -> None:
        """RunTaken if somebody else has taken the run."""
        if self.token is None:
            return
        owner = self.read_info().get("owner")
        if owner is not None and owner["token"] != self.token:
            raise RunTaken(
                f"run {self.name} was taken over from {owner['host']} at {owner['time']}: this one stops, and leaves "
                "it as it is"
            )

    def lost(self) -> bool:
        """Whether somebody else has taken the run; cheap enough for every step."""
        if self.token is None:
            return False
        if self.storage.local:
            seen = Path(self.storage.path(INFO_FILE)).stat().st_mtime_ns
            if seen != self._owner_seen:
                self._look_for_owner()
            self._owner_seen = seen
        elif time.monotonic() >= self._owner_due and (self._looking is None or not self._looking.is_alive()):
            # Training does not wait for the answer.
            self._looking = threading.Thread(target=self._look_for_owner, name="owner", daemon=True)
            self._looking.start()
        return self._taken

    def _look_for_owner(self) -> None:
        began = time.monotonic()
        try:
            self.check_owner()
        except RunTaken:
            self._taken = True
        except StorageError:  # says nothing about it
            pass
        now = time.monotonic()
        self._owner_due = now + max(OWNER_INTERVAL, (now - began) / OWNER_SHARE)

    def record_start(self, **entry: Any) -> int:
        """Adds an entry to run.json, with the time and the code's version: from which step, on which mesh.

        Returns its place among the starts, from 0.
        """
        starts = self.read_info().get("starts", [])
        self.update_info(starts=[*starts, {"time": timestamp()} | entry | {"code_version": code_version()}])
        return len(starts)


def list_runs(directory: str) -> list[RunDirectory]:
    """The runs directly below `directory`, by name."""
    refuse_credentials("--directory", directory)
    names = Storage(directory).directories()
    runs = [RunDirectory(f"{directory.rstrip('/')}/{name}") for name in names]
    return [run for run in runs if run.exists()]


def find_run(name_or_path: str, directory: str = "runs") -> RunDirectory:
    """The run at a path or URL, or of that name below `directory`. ValueError names the nearest if there is none."""
    if (found := run_at(name_or_path, directory)) is not None:
        return found
    if "://" in name_or_path:
        parent = name_or_path.rstrip("/").rpartition("/")[0]
        raise ValueError(f"no run {name_or_path!r}; `longstride runs --directory {parent}` lists those beside it")
    names = [run.name for run in list_runs(directory)]
    nearest = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}?" if nearest else f"{directory} holds {', '.join(names[-5:]) or 'no runs'}"
    raise ValueError(f"no run {name_or_path!r}: neither a path nor a name in {directory}; {hint}")


def run_at(name_or_path: str, directory: str = "runs") -> RunDirectory | None:
    """The run at a path or URL, or of that name below `directory`, if there is one."""
    refuse_credentials("RUN", name_or_path)
    places = [name_or_path] if "://" in name_or_path else [name_or_path, f"{directory.rstrip('/')}/{name_or_path}"]
    return next((run for place in places if (run := RunDirectory(place.rstrip("/"))).exists()), None)


def check_name(name: str) -> str:
    """`name` if it can be a directory's name that stays where it is put; ValueError otherwise."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"run.name={name!r} cannot be used: letters, digits, '.', '_' and '-' only, beginning with a letter or "
            "digit, no '..', at most 128"
        )
    return name


@functools.cache
def code_version() -> str:
    """The package's version with the commit it was run from, marked when files differ from it. Found out once."""
    try:
        version = metadata.version("longstride")
    except metadata.PackageNotFoundError:  # the rooms are on the path without being installed
        version = "uninstalled"
    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit or not (root / ".git").exists():
        return version
    return f"{version}+{commit}" + (".modified" if _git(root, "status", "--porcelain") else "")


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
