"""tokenizer.json and tokenizer_config.json of every tokenizer: the same ids in Hugging Face's library, and back."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer as Engine

from longstride.data import (
    ByteTokenizer,
    DnaTokenizer,
    MuLawTokenizer,
    SubwordTokenizer,
    TokenizerFiles,
    open_corpus,
    prepare,
)
from longstride.data.subwords import train_bpe
from longstride.data.tokenizers import IdTokenizer

TEXT = "def f(x1):\n\treturn 'é' + \"ꙮ😀\"  # 2024\r\n \x7f\x1f\n"
BASES = "ACGTUNRYSWKMBDHV"
BPE = train_bpe(iter([TEXT, *["None"] * 9]), 300)
SAMPLES = {"bytes": TEXT, "dna": f"{BASES} {BASES.lower()}\n\tA\r\fC\vG", "ids": "3 15 0\n7", "bpe": TEXT}
SAMPLES["sound"] = "128 0 255 7"
TOKENIZERS = {"bytes": ByteTokenizer(), "dna": DnaTokenizer(), "ids": IdTokenizer(16), "bpe": BPE}
TOKENIZERS["sound"] = MuLawTokenizer(22050)


def files_of(kind: str) -> TokenizerFiles:
    files = TokenizerFiles.of(TOKENIZERS[kind])
    assert files is not None
    return files


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_ids_are_the_same_there_and_back(kind):
    tokenizer, text, files = TOKENIZERS[kind], SAMPLES[kind], files_of(kind)
    engine, ids = Engine.from_str(files.tokenizer), TOKENIZERS[kind].encode(text).tolist()
    assert engine.encode(text).ids == ids
    assert engine.decode(ids).split() == tokenizer.decode(ids).split()
    assert engine.get_vocab_size() == tokenizer.vocab_size
    back = files.open()
    assert (type(back), back.name, back.separator) == (type(tokenizer), tokenizer.name, tokenizer.separator)
    assert TokenizerFiles.of(back) == files
    end = json.loads(files.config).get("eos_token")
    assert engine.token_to_id(end) == tokenizer.separator if end else tokenizer.separator == -1
    assert files_of("bytes").open().name != files_of("bpe").open().name, "negative control: they are told apart"


def test_sound_is_known_by_its_rate():
    files = files_of("sound")
    assert json.loads(files.config)["sampling_rate"] == 22050
    other = TokenizerFiles.of(MuLawTokenizer(8000))
    assert other is not None and other.tokenizer == files.tokenizer and other.open().name == "mu-law-8000"
    for config in ("{}", '{"sampling_rate": "8 kHz"}'):
        assert replace(files, config=config).open().name.startswith("tokenizer.json:"), "numbers of nobody knows what"


def test_what_is_no_base_is_no_base_there_either():
    engine = Engine.from_str(files_of("dna").tokenizer)
    for strange in ("ACGE", "A-C", "A\N{NO-BREAK SPACE}C"):
        with pytest.raises(ValueError, match="is not a base"):
            DnaTokenizer().encode(strange)
        with pytest.raises(Exception, match="Missing"):
            engine.encode(strange)


def test_the_config_says_what_ends_a_document():
    unusual = BPE.content.replace("<|endoftext|>", "<end>")
    files = TokenizerFiles.of(SubwordTokenizer(unusual, separator="<end>"))
    assert files is not None and files.open().separator == 0
    for config, separator in (("{}", -1), ('{"eos_token": {"content": "<end>"}}', 0), ('{"eos_token": "gone"}', -1)):
        assert replace(files, config=config).open().separator == separator
    assert "None" in BPE.vocabulary()
    assert replace(files_of("bpe"), config='{"eos_token": null}').open().separator == 0, "of the usual names"
    for config in ("{", "[]"):
        with pytest.raises(ValueError, match=r"not a tokenizer_config\.json"):
            replace(files, config=config).open()
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        replace(files, tokenizer="{}").open()


def test_files_that_are_found():
    files = files_of("bpe")
    assert TokenizerFiles.found({}.get) is None
    assert TokenizerFiles.found({"tokenizer.json": files.tokenizer}.get) == files, "the config is made"
    theirs = {"tokenizer.json": files.tokenizer, "tokenizer_config.json": '{"chat_template": "..."}'}
    assert TokenizerFiles.found(theirs.get) == replace(files, config=theirs["tokenizer_config.json"])


def test_a_corpus_in_the_tokens_of_a_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text(files_of("bytes").tokenizer)
    (tmp_path / "a.txt").write_text(TEXT * 50)
    prepare(str(tmp_path / "a.txt"), str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"))
    assert open_corpus(str(tmp_path / "out")).tokenizer.name == "bytes"
    (tmp_path / "tokenizer.json").write_text(files_of("ids").tokenizer)
    with pytest.raises(ValueError, match="no end-of-document token"):
        prepare(str(tmp_path / "a.txt"), str(tmp_path / "other"), tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text(files_of("sound").tokenizer)
    with pytest.raises(ValueError, match=r"a\.txt: the tokenizer cannot encode it: .*Missing"):
        prepare(str(tmp_path / "a.txt"), str(tmp_path / "other"), tokenizer=str(tmp_path / "tokenizer.json"))
