"""Recordings: read into levels of mu-law a block at a time, whatever libsndfile reads, and written as WAV."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from .mu_law import decode, encode

_SAMPLES_AT_ONCE = 1 << 18
_LOUDEST = 16.0  # 24 dB above full scale: what exceeds it is not clipped sound, but numbers of another scale
_UNKNOWN_SIZE = 0x7FFF0000  # from here on, the size in the header of what was written into a pipe
_LONGEST_OGG_PAGE = 65307


def read_levels(path: str, sample_rate: int) -> Iterator[np.ndarray]:
    """The levels of a file that libsndfile reads, in blocks: memory does not grow with its length.

    Channels are averaged; other rates than `sample_rate` (Hz) are resampled by soxr at its high quality.
    ValueError: it is no such file, is damaged, breaks off, or holds no sound.
    """
    try:
        with soundfile.SoundFile(path) as sound:
            _refuse_cut(sound, path)
            yield from map(encode, _resampled(_mono(sound), sound.samplerate, sample_rate))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"not sound, or damaged: {error.error_string.rstrip('.')}") from error


def wav(levels: np.ndarray, sample_rate: int) -> bytes:
    """The content of a WAV file of 16 bits a sample."""
    content = io.BytesIO()
    soundfile.write(content, decode(levels), sample_rate, format="WAV", subtype="PCM_16")
    return content.getvalue()


def _mono(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    frames = 0
    at_once = max(1, _SAMPLES_AT_ONCE // sound.channels)
    while len(block := sound.read(at_once, dtype="float32", always_2d=True)):
        samples = block.mean(axis=1)
        if not (loudest := np.abs(samples).max()) < _LOUDEST:
            raise ValueError(f"it has a sample of {loudest:.4g}, and sound is from -1 to 1: scale it")
        frames += len(block)
        yield samples
    if not frames:
        raise ValueError("it holds no sound: leave it out")
    if frames != sound.frames:
        raise ValueError(f"it breaks off: {frames:,} of its {sound.frames:,} samples are there")


def _resampled(blocks: Iterator[np.ndarray], rate: int, wanted: int) -> Iterator[np.ndarray]:
    if rate == wanted:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _refuse_cut(sound: soundfile.SoundFile, path: str) -> None:
    """ValueError for what libsndfile reads to an early end without a word: what breaks off, or is of unknown length."""
    size = re.search(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", sound.extra_info, re.MULTILINE)
    if size and int(size[2]) < int(size[1]) < _UNKNOWN_SIZE:
        raise ValueError(f"it breaks off: {int(size[2]):,} of its {int(size[1]):,} bytes of sound are there")
    if sound.format == "OGG" and not _ends_its_stream(path):
        raise ValueError("it breaks off: its last Ogg page is not the end of a stream")
    if sound.format == "MP3" and not _says_its_length(path):
        raise ValueError("it has no Xing or Info header, and so no length: write it anew, or as FLAC")


def _ends_its_stream(path: str) -> bool:
    """Whether the last page of an Ogg file (RFC 3533, section 6) is whole and marked as a stream's last."""
    with Path(path).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_OGG_PAGE))
        end = file.read()
    page = end[max(0, end.rfind(b"OggS")) :]
    whole = len(page) >= 27 and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return whole and bool(page[5] & 4)


def _says_its_length(path: str) -> bool:
    """Whether the first frame of an MP3 is the one that says how many there are; libsndfile guesses without it."""
    with Path(path).open("rb") as file:
        head = file.read(10)
        if head.startswith(b"ID3"):  # a tag before it, its length in four bytes of seven bits
            file.seek(10 + sum(byte << 7 * place for place, byte in enumerate(reversed(head[6:]))))
        else:
            file.seek(0)
        frame = file.read(256)
    return b"Xing" in frame or b"Info" in frame
