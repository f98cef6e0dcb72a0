"""Subword tokenizers."""

import json
from pathlib import Path

import pytest

from longstride.data import SubwordTokenizer, open_corpus, prepare
from longstride.data.subwords import END_OF_TEXT, train_bpe

TEXT = "The year 2024 had 366 days; 1999 had 365. naïve café €5 😀\n\n  def f(x1):\n\treturn x1 + 10\n"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter([TEXT] * 20), 400)


def test_bpe_is_lossless_and_splits_digits(bpe):
    tokens = bpe.encode(TEXT)
    assert bpe.decode(tokens) == TEXT
    assert len(tokens) < len(TEXT.encode())
    assert tokens.dtype == "uint16" and tokens.max() < bpe.vocab_size <= 400
    pieces = [bpe.decode([token]) for token in tokens]
    assert all(len(piece.strip()) == 1 for piece in pieces if any(letter.isdigit() for letter in piece))
    assert bpe.decode(bpe.encode("unseen ꙮ 12")) == "unseen ꙮ 12"


def test_training_is_deterministic(bpe):
    assert train_bpe(iter([TEXT] * 20), 400).content == bpe.content


def test_separators_are_not_written_by_text(bpe):
    assert bpe.separator == 0
    tokens = bpe.encode(f"a{END_OF_TEXT}b")
    assert 0 not in tokens
    assert bpe.decode(tokens) == f"a{END_OF_TEXT}b"
    assert bpe.decode([*bpe.encode("a"), 0, *bpe.encode("b")]) == "a\nb"


def test_any_tokenizer_json(bpe, tmp_path):
    changed = json.loads(bpe.content)
    changed["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    for token in changed["added_tokens"]:
        token["content"] = "<end>"
    vocabulary = changed["model"]["vocab"]
    vocabulary["<end>"] = vocabulary.pop(END_OF_TEXT)
    content = json.dumps(changed)
    with pytest.raises(ValueError, match="no end-of-document token of the usual names"):
        SubwordTokenizer(content)
    with pytest.raises(ValueError, match="no end-of-document token '<stop>'"):
        SubwordTokenizer(content, separator="<stop>")
    with pytest.raises(ValueError, match=r"not a tokenizer.json"):
        SubwordTokenizer("{}")
    assert len(SubwordTokenizer(content, separator="<end>").encode("one two three four 5 6 7")) > 3

    (tmp_path / "other.json").write_text(content)
    (tmp_path / "a.txt").write_text(TEXT * 50)
    out = str(tmp_path / "out")
    made = prepare(
        str(tmp_path / "a.txt"), out, tokenizer=str(tmp_path / "other.json"), separator="<end>", validation=0.2
    )
    corpus = open_corpus(out)
    assert made.vocab_size == corpus.vocab_size == bpe.vocab_size
    tokens = [corpus.read(split, 0, corpus.num_tokens(split)) for split in ("train", "validation")]
    assert corpus.decode(tokens[0][:-1]) + corpus.decode(tokens[1][:-1]) == TEXT * 50
    assert corpus.encode("x1").tolist() == bpe.encode("x1").tolist()
    assert Path(out, "tokenizer.json").read_text() == content
    Path(out, "tokenizer.json").write_text(content.replace("0", "1", 1))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        open_corpus(out)


def test_bpe_trained_by_prepare_sees_no_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("common words here " * 500 + "zyxwvut " * 100)
    out = str(tmp_path / "out")
    prepare(str(tmp_path / "a.txt"), out, tokenizer="bpe", vocab_size=400, validation=0.09)
    assert "zyx" not in Path(out, "tokenizer.json").read_text()
    assert "common" in Path(out, "tokenizer.json").read_text()
