"""Recordings as corpora: levels of mu-law of any file, in memory that does not grow; or one line that names it."""

import gzip
import itertools
import threading
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from longstride.data import CorpusError, MuLawTokenizer, ShardedCorpus, open_corpus, prepare
from longstride.data import parts as parts_module
from longstride.data.audio import read_levels, wav
from longstride.data.mu_law import LEVELS, SILENCE, decode, encode
from longstride.data.sources import expand, recording

from ..faults.conftest import server as server
from ..faults.conftest import store as store
from .conftest import stream
from .test_prepare import contents

RATE = 16000
LOSSLESS = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE")]
LOSSLESS += [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("AIFF", "PCM_16")]
LOSSY = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("WAV", "IMA_ADPCM")]


def sine(seconds=1.0, rate=RATE, hertz=440.0, loudness=0.5):
    return loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path, samples, rate=RATE, subtype=None, form=None):
    """Block by block: libsndfile's Vorbis encoder takes no long array at once."""
    channels = samples.shape[1] if samples.ndim == 2 else 1
    with soundfile.SoundFile(path, "w", rate, channels, subtype=subtype, format=form) as file:
        for start in range(0, len(samples), 1 << 14):
            file.write(samples[start : start + (1 << 14)])
    return str(path)


def levels_of(path, rate=RATE):
    return np.concatenate([*read_levels(str(path), rate)])


def loudest_hertz(samples, rate):
    return float(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))).argmax() * rate / len(samples))


@pytest.mark.parametrize(("form", "subtype"), LOSSLESS)
def test_what_is_lossless_is_read_to_the_level(tmp_path, form, subtype):
    samples = np.round(sine(0.7) * 2**15) / 2**15
    path = write(tmp_path / "a.sound", samples, form=form, subtype=subtype)
    assert np.array_equal(levels_of(path), encode(samples))


@pytest.mark.parametrize(("form", "subtype"), LOSSLESS + LOSSY)
@pytest.mark.parametrize("rate", [8000, 48000])
def test_a_tone_keeps_its_height_and_its_length(tmp_path, form, subtype, rate):
    path = write(tmp_path / "a.sound", sine(1.5, rate), rate, form=form, subtype=subtype)
    for wanted in (RATE, 11025):
        samples = decode(levels_of(path, wanted))
        assert len(samples) == pytest.approx(1.5 * wanted, rel=0.03)
        middle = samples[wanted // 4 : wanted // 4 + wanted]
        assert loudest_hertz(middle, wanted) == pytest.approx(440, abs=1)
        assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    assert loudest_hertz(middle, RATE) > 600, "negative control: at another rate it is another tone"


def test_channels_are_averaged(tmp_path):
    left, right = sine(0.2), sine(0.2, hertz=1000)
    path = write(tmp_path / "a.wav", np.stack([left, right, 0 * left], axis=1), subtype="FLOAT")
    expected = decode(encode((left + right) / 3))
    assert np.abs(decode(levels_of(path)) - expected).max() < 0.02
    path = write(tmp_path / "b.wav", np.stack([left, -left], axis=1), subtype="FLOAT")
    assert (levels_of(path) == SILENCE).all()


@pytest.fixture
def sounds(tmp_path):
    """Twelve recordings of several kinds, a second or so each, in a folder."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number, (ending, rate) in enumerate(itertools.product(("wav", "flac", "ogg"), (16000, 16000, 22050, 8000))):
        samples = sine(1 + number / 7, rate, hertz=200 + 50 * number)
        write(folder / f"{number:02d}.{ending}", np.stack([samples, samples], axis=1), rate)
    return str(folder)


def recordings(corpus, split):
    """By the index alone; each must end with its separator, and no other place has one."""
    size, tokens = corpus.num_tokens(split), stream(corpus, split)
    edges = [*corpus.document_starts(split, 0, size).tolist(), size]
    assert np.flatnonzero(tokens == corpus.tokenizer.separator).tolist() == [edge - 1 for edge in edges[1:]]
    return [tokens[start : stop - 1] for start, stop in itertools.pairwise(edges)]


@pytest.mark.parametrize("part_bytes", [1, 200_000, 64 << 20])
def test_every_recording_is_a_document_whose_end_is_held_out(sounds, tmp_path, part_bytes):
    made = prepare(sounds, str(tmp_path / "out"), part_bytes=part_bytes, validation=0.1)
    corpus = open_corpus(str(tmp_path / "out"))
    assert isinstance(corpus.tokenizer, MuLawTokenizer) and corpus.tokenizer.sample_rate == RATE
    assert (made.tokenizer, made.vocab_size) == (corpus.tokenizer.name, corpus.vocab_size) == ("mu-law-16000", 257)
    files = sorted(Path(sounds).iterdir())
    parts = {split: recordings(corpus, split) for split in ("train", "validation")}
    for file, head, tail in zip(files, parts["train"], parts["validation"], strict=True):
        expected = levels_of(file)
        assert np.array_equal(np.concatenate([head, tail]), expected)
        assert len(tail) == round(0.1 * len(expected))
    assert made.num_shards == (2 if part_bytes > 1 << 20 else 2 * len(files) if part_bytes == 1 else made.num_shards)


def test_whole_recordings_are_held_out_by_their_sound(sounds, tmp_path):
    """The same sound in another file, of another kind, falls on the same side."""
    for file in Path(sounds).glob("*.wav"):
        samples, rate = soundfile.read(file)
        write(Path(sounds) / f"again-{file.stem}.flac", samples, rate)
    prepare(sounds, str(tmp_path / "out"), holdout="documents", validation=0.4)
    corpus = open_corpus(str(tmp_path / "out"))
    found = {split: [part.tobytes() for part in recordings(corpus, split)] for split in ("train", "validation")}
    expected = [levels_of(file).astype("<u2").tobytes() for file in Path(sounds).iterdir()]
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert found["train"] and found["validation"] and not set(found["train"]) & set(found["validation"])
    assert len(set(found["train"]) | set(found["validation"])) == len(expected) - 4


def test_interruptions_and_workers_leave_the_same_bytes(sounds, tmp_path, monkeypatch):
    options = {"part_bytes": 100_000, "sample_rate": 8000, "holdout": "documents", "validation": 0.3}
    prepare(sounds, str(tmp_path / "straight"), workers=1, **options)
    made, original = [], parts_module.make_part

    def failing(folder, number, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(number)
        return original(folder, number, *rest)

    monkeypatch.setattr("longstride.data.preparation.make_part", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(sounds, str(tmp_path / "broken"), workers=1, **options)
    monkeypatch.undo()
    (tmp_path / "broken" / "train-00004.tokens.writing").write_bytes(b"of a process that was killed")
    again = []
    prepare(sounds, str(tmp_path / "broken"), workers=3, progress=again.append, **options)
    assert (again[0].parts_done, again[0].num_parts) == (3, 5)
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")
    with pytest.raises(CorpusError, match="prepared from other sources or settings"):
        prepare(sounds, str(tmp_path / "broken"), **options | {"sample_rate": 16000})


def peak_memory(action):
    """Bytes that Python and NumPy held at once, more than before; other threads are ours."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("holdout", ["tail", "documents"])
def test_memory_does_not_grow_with_a_recording(tmp_path, holdout):
    """A minute and a quarter of an hour; of the long one all tokens would be 19 MB."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * 11025)
    peaks = []
    for minutes in (1, 15):
        path = write(tmp_path / f"{minutes}.wav", np.tile(noise, minutes), 11025, subtype="PCM_16")
        out = str(tmp_path / f"{minutes}-{holdout}")
        peaks.append(peak_memory(lambda path=path, out=out: prepare(path, out, sample_rate=11025, holdout=holdout)))
        assert sum(open_corpus(out).num_tokens(split) for split in ("train", "validation")) >= minutes * len(noise)
    assert peaks[1] < peaks[0] + (1 << 20)
    whole = peak_memory(lambda: levels_of(tmp_path / "15.wav", 11025))
    assert whole > peaks[1] - peaks[0] + (8 << 20), "negative control: memory is seen"


def cut(path, share):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: round(len(content) * share)])


MISTAKES = {
    "text by a sound's name": (
        "text.wav",
        {},
        r"cannot read \S*text.wav: not sound, or damaged: Format not recognised",
    ),
    "gone": ("gone.wav", {}, r"cannot read gone.wav: no such file"),
    "no byte": ("void.flac", {}, r"nothing is in void.flac: 1 empty file"),
    "no sample": ("empty.wav", {}, r"cannot read \S*empty.wav: it holds no sound: leave it out"),
    "a sample that is no number": ("nan.wav", {}, r"cannot read \S*nan.wav: it has a sample of nan"),
    "integers in floats": ("loud.wav", {}, r"loud.wav: it has a sample of 9000, and sound is from -1 to 1: scale it"),
    "sound and text": (["whole.wav", "a.txt"], {}, r"whole.wav is audio and \S*a.txt is text: prepare them apart"),
    "sound as bytes": ("whole.wav", {"tokenizer": "bytes"}, r"'bytes' is not for audio, .*whole.wav is: take 'mu-law'"),
    "sound's words": ("whole.wav", {"vocab_size": 300}, r"vocab_size is chosen for a tokenizer that is trained here"),
    "sound's end": ("whole.wav", {"separator": "x"}, r"a separator is chosen for a tokenizer.json, not for 'mu-law-"),
    "kilohertz": ("whole.wav", {"sample_rate": 16}, r"sample_rate 16 is in Hz: take at least 1000, as in 16000"),
    "text's rate": (
        "a.txt",
        {"sample_rate": 8000},
        r"sample_rate 8000 is for audio and \S*a.txt is text: leave it out",
    ),
    "text as sound": ("a.txt", {"tokenizer": "mu-law"}, r"'mu-law' is for audio and \S*a.txt is text: leave it out"),
    "text called sound": ("a.txt", {"format": "audio"}, r"cannot read \S*a.txt: not sound, or damaged"),
}


@pytest.mark.parametrize(("source", "options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    Path("text.wav").write_text("no sound" * 99)
    Path("a.txt").write_text("hello")
    Path("void.flac").touch()
    write("empty.wav", sine(0))
    write("nan.wav", np.append(sine(0.1), np.nan), subtype="FLOAT")
    write("loud.wav", sine(0.1, hertz=4000, loudness=9000), subtype="FLOAT")
    write("whole.wav", sine(0.1))
    with pytest.raises(ValueError, match=message) as caught:
        prepare(source, "out", **options)
    assert "\n" not in str(caught.value)
    assert not Path("out/index.json").exists()


@pytest.mark.parametrize(("form", "subtype"), [*LOSSLESS[::3], ("FLAC", "PCM_24"), ("AIFF", "PCM_16"), *LOSSY[:3]])
def test_a_file_that_breaks_off_is_named(tmp_path, form, subtype):
    """libsndfile reads most of these to their early end without a word."""
    path = tmp_path / f"a.{form.lower()}"
    for share in (1, 0.999, 0.6, 0.1):
        write(path, sine(3, 48000) + 0.01 * np.random.default_rng(0).standard_normal(3 * 48000), 48000, subtype, form)
        if share == 1:
            assert len(levels_of(path)) == pytest.approx(3 * RATE, rel=0.01), "negative control: it is whole"
            continue
        cut(path, share)
        with pytest.raises(CorpusError, match=rf"cannot read \S*{path.name}: (it breaks off|not sound, or damaged): "):
            prepare(str(path), str(tmp_path / "out"), overwrite=True)
    assert not list((tmp_path / "out").glob("*.tokens*")), "nothing of it is left"
    assert threading.active_count() < 10


def test_a_file_that_has_gone_meanwhile_is_named(tmp_path):
    file = expand([write(tmp_path / "a.wav", sine(0.1))])[0]
    (tmp_path / "a.wav").unlink()
    with pytest.raises(CorpusError, match=r"^cannot read \S+a.wav: no such file$"):
        list(recording(file, RATE))


def test_an_mp3_says_how_long_it_is(tmp_path):
    """Without its first frame libsndfile guesses, and reads a part or finds too little."""
    content = Path(write(tmp_path / "a.mp3", sine())).read_bytes()
    (tmp_path / "tagged.mp3").write_bytes(b"ID3\4\0\0\0\0\2\2" + b"x" * 258 + content)
    assert np.array_equal(levels_of(tmp_path / "tagged.mp3"), levels_of(tmp_path / "a.mp3"))
    (tmp_path / "b.mp3").write_bytes(content[content.find(content[:2], 2) :])
    with soundfile.SoundFile(tmp_path / "b.mp3") as file:
        assert file.frames != RATE, "negative control: it is a guess"
    with pytest.raises(CorpusError, match=r"b.mp3: it has no Xing or Info header, .* or as FLAC"):
        prepare(str(tmp_path / "b.mp3"), str(tmp_path / "out"))


def test_what_was_written_into_a_pipe_is_whole(tmp_path):
    """Such a WAV has sizes in its header that nobody knew: as large as can be, or none."""
    content = Path(write(tmp_path / "a.wav", sine())).read_bytes()
    for size in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
        (tmp_path / "piped.wav").write_bytes(content[:4] + size + content[8:40] + size + content[44:])
        assert np.array_equal(levels_of(tmp_path / "piped.wav"), levels_of(tmp_path / "a.wav"))


def test_written_sound_is_what_its_levels_stand_for(tmp_path):
    levels = np.arange(LEVELS, dtype=np.uint8)
    (tmp_path / "a.wav").write_bytes(wav(levels, 8000))
    assert np.array_equal(levels_of(tmp_path / "a.wav", 8000), levels)
    assert soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"


def test_a_store_and_a_disk_and_packed_files_give_the_same(store, sounds, tmp_path):
    fs = fsspec.filesystem("s3")
    for file in sorted(Path(sounds).iterdir()):
        fs.pipe_file(f"bucket/sounds/{file.name}", file.read_bytes())
    prepare("s3://bucket/sounds", "s3://bucket/corpus", part_bytes=300_000)
    prepare(sounds, str(tmp_path / "out"), part_bytes=300_000)
    remote, local = open_corpus("s3://bucket/corpus"), open_corpus(str(tmp_path / "out"))
    assert remote.fingerprint() == local.fingerprint() and np.array_equal(
        stream(remote, "train"), stream(local, "train")
    )
    with pytest.raises(CorpusError, match=r"cannot read s3://bucket/cut.ogg: it breaks off"):
        fs.pipe_file("bucket/cut.ogg", (Path(sounds) / "09.ogg").read_bytes()[:-9])
        prepare("s3://bucket/cut.ogg", "s3://bucket/none")
    (tmp_path / "a.wav.gz").write_bytes(gzip.compress((Path(sounds) / "01.wav").read_bytes()))
    prepare(str(tmp_path / "a.wav.gz"), str(tmp_path / "packed"), validation=0)
    corpus = ShardedCorpus(str(tmp_path / "packed"))
    assert np.array_equal(recordings(corpus, "train")[0], levels_of(Path(sounds) / "01.wav"))
