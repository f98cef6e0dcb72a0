"""A run on sound through the command: recordings in, a WAV out, and nothing printed as text that is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from longstride.data.audio import read_levels
from longstride.data.mu_law import SILENCE
from longstride.orchestrator.cli import main
from longstride.workers import Experiment, find_run
from longstride.workers.run_tokenizer import run_tokenizer

from .commands import CONFIG, losses

RATE = 8000


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run on two seconds of two recordings."""
    (place / "sounds").mkdir()
    for name, hertz in (("low.wav", 200), ("high.flac", 900)):
        tone = 0.4 * np.sin(2 * np.pi * hertz * np.arange(2 * RATE) / RATE)
        soundfile.write(place / "sounds" / name, tone, RATE)
    assert main(["prepare", "sounds", "corpus", "--sample-rate", str(RATE)]) == 0
    assert "tokenizer mu-law-8000, vocabulary 257; documents: 2 train, 2 validation" in capsys.readouterr().out
    config = CONFIG.replace("vocab_size: 256", "vocab_size: 257").replace("python-source", "corpus")
    (place / "sound.yaml").write_text(config.replace('sample: {prompt: "def ", tokens: 8}', "run: {name: sound}"))
    assert main(["train", "sound.yaml"]) == 0
    output = capsys.readouterr().out
    assert "sample:" not in output and "longstride generate runs/sound --out sound.wav" in output
    return place / "runs" / "sound"


def heard(path: Path) -> np.ndarray:
    return np.concatenate([*read_levels(str(path), RATE)])


def test_sound_begins_from_nothing_or_goes_on(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "sound", "--tokens", "50", "--out"]
    assert main([*words, "new.wav"]) == 0
    assert capsys.readouterr().out == "new.wav: 0.01 s of sound at 8,000 Hz\n"
    info = soundfile.info(place / "new.wav")
    assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
    new = heard(place / "new.wav")
    assert new[0] == SILENCE and 45 <= len(new) <= 51, "but for tokens that end a recording"

    (place / "corpus").rename(place / "away")  # the run's own tokenizer knows the rate
    begun = 0.3 * np.sin(np.arange(2 * RATE) / 5)
    soundfile.write(place / "begun.flac", np.stack([begun, begun], axis=1), 2 * RATE)
    assert main([*words, "on/going.wav", "--prompt", "begun.flac", "--temperature", "0"]) == 0
    going, before = heard(place / "on" / "going.wav"), heard(place / "begun.flac")
    assert len(before) == RATE and np.array_equal(going[:RATE], before) and len(going) == RATE + 50


def test_it_is_scored_resumed_and_imported(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "sound"]) == 0
    output = capsys.readouterr().out
    assert " bits per token" in output and "held-out tokens    256 in 2 sequences of 128" in output
    assert main(["resume", "sound", "train.steps=8"]) == 0
    assert len(losses(run)) == 8

    assert main(["import", "runs/sound", "runs/child", "sample.tokens=5"]) == 0
    assert "longstride generate runs/child --out sound.wav" in capsys.readouterr().out
    assert main(["generate", "child", "--out", "child.wav"]) == 0
    child = find_run("child")
    assert run_tokenizer(child, Experiment.resume(child).data).name == "mu-law-8000"

    assert main(["prepare", "sounds", "finer", "--sample-rate", "9000"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "sound", "data.corpus=finer"]) == 2
    error = capsys.readouterr().err
    assert "was trained on mu-law-8000 and" in error and "OUT --sample-rate 8000` and give data.corpus=OUT" in error


MISTAKES = {
    "nowhere to write": ((), "run sound makes sound; give --out FILE.wav to write it to"),
    "another format": (("--out", "a.mp3"), "--out a.mp3: sound is written as WAV; give a name that ends in .wav"),
    "two prompts": (("--out", "a.wav", "--prompt", "x", "--prompt", "y"), "--out a.wav holds one sound, not 2"),
    "no such recording": (("--out", "a.wav", "--prompt", "gone.wav"), "cannot read gone.wav: no such file"),
    "a folder": (("--out", "a.wav", "--prompt", "sounds"), "sounds is 2 files; name one recording to continue"),
    "text": (("--out", "a.wav", "--prompt", "sound.yaml"), "sound.yaml: not sound, or damaged"),
    "a place that is none": (("--out", "sound.yaml/a.wav", "--tokens", "1"), "cannot write sound.yaml/a.wav"),
}


def test_mistakes_are_one_line(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, line in MISTAKES.values():
        assert main(["generate", "sound", *words]) == 2
        captured = capsys.readouterr()
        assert line in captured.err and captured.err.startswith("longstride: ") and captured.err.count("\n") == 1
        assert not captured.out and not (place / "a.wav").exists()
