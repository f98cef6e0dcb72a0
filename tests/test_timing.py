"""What `@pytest.mark.timing` forgives, and what not: pytest itself, run on three small tests."""

import subprocess
import sys
from pathlib import Path

SMALL = """
import pytest
from tests.timing import in_time

tries = {"stalled": 0, "waits": 0, "wrong": 0}

@pytest.mark.timing
def test_stalled_once():
    tries["stalled"] += 1
    in_time(tries["stalled"] > 1)

@pytest.mark.timing
def test_waits_always():
    tries["waits"] += 1
    in_time(False, "try", tries["waits"])

@pytest.mark.timing
def test_wrong_once():
    tries["wrong"] += 1
    assert tries["wrong"] > 1

def test_of_no_time():
    assert True
"""


def test_a_time_has_three_tries_and_anything_else_one(tmp_path: Path) -> None:
    (tmp_path / "test_small.py").write_text(SMALL)
    words = ["-p", "tests.conftest", "-c", "pyproject.toml", "-p", "no:cacheprovider", "-m", "alone"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(tmp_path / "test_small.py")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    *_, failed_time, failed, summary = found.stdout.splitlines()
    assert "test_waits_always" in failed_time and "('try', 3)" in failed_time, found.stdout
    assert "test_wrong_once" in failed
    assert summary.startswith("2 failed, 1 passed, 1 deselected, 3 rerun"), "none is alone that is not said to be"
