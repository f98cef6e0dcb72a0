"""Every test of the command works in a directory of its own, as a user would, with a small config in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .commands import write_config


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the test, holding small.yaml."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "LONGSTRIDE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    write_config(tmp_path)
    return tmp_path
