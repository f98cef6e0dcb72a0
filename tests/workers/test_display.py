"""What is printed, on a terminal and off one."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from longstride.workers.display import Display, command, count, duration, status_line, summary_lines, tracking_command
from longstride.workers.reporting import RunStart, Summary

from .test_run_directory import record

START = RunStart(
    "run", "/r/run", 0, 20, 20, 12345, 12345, "python-source", 8192, 2, 2, {"data": 1, "sequence": 2}, "float32", "cpu"
)
SUMMARY = Summary(
    "run", "/r/run", 20, 20, 1280, True, 2.0, 1.5, 61.0, "def ", "f(x):\n    return [x]", "sqlite:////r/m.db"
)


def shown(terminal: bool, width: int = 100, start: RunStart = START) -> str:
    stream = io.StringIO()
    now = iter(float(second) for second in range(1000))
    display = Display(Console(file=stream, force_terminal=terminal, width=width, highlight=False), lambda: next(now))
    display.started(start)
    for step in range(1, 21):
        display.stepped(record(step))
    display.noted("a note with [brackets]")
    display.finished(SUMMARY)
    display.close()
    return stream.getvalue()


def test_plain_lines_off_a_terminal() -> None:
    text = shown(terminal=False)
    assert "\x1b" not in text
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert steps[0].startswith("step 1/20 loss 2.000 10.0k tok/s wait 10% mem 1.00 GiB left")
    assert steps[-1].startswith("step 20/20")
    assert 3 <= len(steps) <= 6  # the first, one in ten seconds of this clock, the last
    assert "a note with [brackets]" in text
    assert "return [x]" in text


def test_what_is_frozen_is_said() -> None:
    assert "12,345 parameters, float32" in shown(terminal=False)
    assert "12,345 parameters (345 of them trained), float32" in shown(
        terminal=False, start=replace(START, trained=345)
    )


def test_one_live_line_on_a_terminal() -> None:
    text = shown(terminal=True)
    assert "20/20" in text
    assert "tok/s" in text
    assert "a note with [brackets]" in text


def test_the_status_fits_a_terminal_of_eighty_columns() -> None:
    assert len(status_line(record(100000), 1.5, 36000.0)) + len("100000/200000 ") <= 90
    assert "val 1.500" in status_line(record(1), 1.5, 10.0)


def test_the_summary_has_every_command() -> None:
    lines = summary_lines(SUMMARY)
    text = "\n".join(lines)
    assert "validation loss 1.5000 nats per token" in text
    assert "resume /r/run train.steps=40" in text
    assert "generate /r/run --prompt 'def '" in text
    assert "generate /r/run --out sound.wav" in summary_lines(replace(SUMMARY, audio=True))[-2]
    assert "ui --backend-store-uri sqlite:////r/m.db" in text


def test_commands_name_programs_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    program = shlex.split(command("mlflow", "ui"))[0]
    assert Path(program).exists()


def test_a_tracking_server_is_shown_by_its_address() -> None:
    assert tracking_command("http://host:5000") == "http://host:5000"


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (12345, "12.3k"), (3.2e6, "3.2M")])
def test_counts(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (125.4, "2:05"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
