"""The embedded corpora and the tokenizers."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from longstride.data import ByteTokenizer, CorpusError, DnaTokenizer, SequenceLoader, embedded, open_corpus
from longstride.data.embedded import Ecoli, PythonSource


@pytest.fixture
def library(tmp_path):
    """A small library: forty files in folders, one of them empty, and things that are not part of it."""
    for number in range(40):
        path = tmp_path / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# module {number}\n" * (number % 7 + 1))
    (tmp_path / "empty.py").touch()
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "site-packages" / "other").mkdir(parents=True)
    (tmp_path / "site-packages" / "other" / "foreign.py").write_text("foreign = True\n")
    return tmp_path


def texts(corpus, split):
    stream = corpus.read(split, 0, corpus.num_tokens(split)).tobytes()
    assert stream.endswith(b"\0")
    return stream[:-1].split(b"\0")


def test_files_are_whole_documents_and_splits_share_none(library):
    corpus = PythonSource(library)
    train, held_out = texts(corpus, "train"), texts(corpus, "validation")
    files = [path.read_bytes() for path in library.glob("package*/*.py")]
    assert sorted(train + held_out) == sorted(files)
    assert held_out and not set(train) & set(held_out)
    assert train != sorted(train)
    for split, documents in (("train", train), ("validation", held_out)):
        starts = np.cumsum([0, *(len(text) + 1 for text in documents)])[:-1]
        size = corpus.num_tokens(split)
        assert corpus.document_starts(split, 0, size).tolist() == starts.tolist()
        middle = [start for start in starts.tolist() if 20 <= start < size - 20]
        assert corpus.document_starts(split, 20, size - 20).tolist() == middle


def test_any_range_is_the_same_as_the_whole(library):
    corpus = PythonSource(library)
    whole = corpus.read("train", 0, corpus.num_tokens("train"))
    for start in range(0, len(whole), 7):
        for size in (1, 2, 15, 200):
            stop = min(start + size, len(whole))
            assert np.array_equal(corpus.read("train", start, stop), whole[start:stop])


def test_indexing_reads_nothing_and_slices_read_only_themselves(library, monkeypatch):
    read = []
    original = embedded.read_bytes
    monkeypatch.setattr(embedded, "read_bytes", lambda *a: read.append(original(*a)) or read[-1])
    corpus = PythonSource(library)
    corpus.document_starts("train", 0, 1000)
    corpus.fingerprint()
    assert not read
    with SequenceLoader(corpus, 128, 2, seed=0, bounds=(32, 64), prefetch=0) as loader:
        separators = sum(int((next(loader).tokens_BT == 0).sum()) for _ in range(4))
    assert 4 * 2 * 33 - 8 <= sum(map(len, read)) + separators <= 4 * 2 * 33


def test_the_fingerprint_and_the_split_depend_on_paths_and_sizes(library):
    first, again = PythonSource(library), PythonSource(library)
    assert first.fingerprint() == again.fingerprint()
    held_out = texts(first, "validation")
    (library / "package0" / "new.py").write_text("new = 1\n")
    changed = PythonSource(library)
    assert changed.fingerprint() != first.fingerprint()
    assert set(held_out) <= set(texts(changed, "validation"))  # a new file moves no other


def test_a_file_cut_short_or_gone_is_named(library):
    corpus = PythonSource(library)
    for path in library.glob("package*/*.py"):
        path.write_text("#")
    with pytest.raises(CorpusError, match=r"module\d+\.py is shorter than when indexed"):
        texts(corpus, "train")
    for path in library.glob("package*/*.py"):
        path.unlink()
    with pytest.raises(CorpusError, match=r"cannot read .*module\d+\.py: No such file"):
        texts(corpus, "train")
    with pytest.raises(CorpusError, match="no readable"):
        PythonSource(library / "nowhere")


def test_the_interpreters_own_library():
    corpus = open_corpus("python-source")
    train, held_out = corpus.num_tokens("train"), corpus.num_tokens("validation")
    assert train > 3_000_000
    assert 0.01 < held_out / train < 0.15
    with SequenceLoader(corpus, 8192, 2, seed=0) as loader:
        batch = next(loader)
    assert batch.tokens_BT.max() < corpus.vocab_size == 256
    for row, starts in zip(batch.tokens_BT, batch.document_starts, strict=True):
        assert [place + 1 for place in np.flatnonzero(row.numpy() == 0) if place + 1 < 8192] == list(starts)


def test_the_chromosome():
    corpus = open_corpus("ecoli")
    tokens = np.concatenate([corpus.read(split, 0, corpus.num_tokens(split)) for split in ("train", "validation")])
    lines = gzip.decompress(Path(embedded.__file__).with_name("NC_008253.fna.gz").read_bytes()).decode().splitlines()
    assert len(tokens) == 4_938_920
    assert corpus.decode(tokens) == "".join(lines[1:])
    assert corpus.num_tokens("train") >= 3 * (1 << 20)
    assert corpus.num_tokens("validation") >= (1 << 20) + 1
    assert (np.bincount(tokens, minlength=6) > 0).tolist() == [False, True, True, True, True, False]
    assert corpus.vocab_size == 6
    assert corpus.fingerprint() == Ecoli().fingerprint()


def test_an_unknown_corpus_names_the_nearest():
    with pytest.raises(CorpusError, match="unknown corpus 'pyton-source': did you mean 'python-source'"):
        open_corpus("pyton-source")
    with pytest.raises(CorpusError, match=r"unknown corpus 'qqq': take .*ecoli, .*python-source, .*or the path"):
        open_corpus("qqq")


def test_bytes_there_and_back():
    tokenizer = ByteTokenizer()
    text = "def f(x):\n\treturn 'ä€😀'\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).dtype == tokenizer.dtype == np.uint8
    assert tokenizer.decode([97, 0, 98, 0xC3]) == "a\nb\ufffd"
    assert tokenizer.encode("").shape == (0,)


def test_dna_there_and_back():
    tokenizer = DnaTokenizer()
    assert tokenizer.decode(tokenizer.encode("acgt nRY\nACGTU")) == "ACGTNNNACGTT"
    assert tokenizer.encode("ACGTN").tolist() == [1, 2, 3, 4, 5]
    assert tokenizer.decode([1, tokenizer.separator, 77]) == "A\n?"
    with pytest.raises(ValueError, match="'é' is not a base"):
        tokenizer.encode("ACGé")
    with pytest.raises(ValueError, match="'!' is not a base"):
        tokenizer.encode("ACG!")
