"""A run has its tokenizer with it: it says and exports text without the corpus that it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from longstride.data import TokenizerFiles, open_corpus, prepare
from longstride.orchestrator.cli import main
from longstride.workers import Experiment, find_run
from longstride.workers.run_tokenizer import kept_tokenizer, run_tokenizer

from .test_model_commands import TASK

FILES = ("tokenizer.json", "tokenizer_config.json")
SOURCES = {"dna": "acgtnACGTN" * 200, "bpe": "Every word of every line is a word, 2024.\n" * 60}
SMALL = ["data.context=48", "data.batch=2", "data.validation_sequences=2", "train.steps=1", "sample.tokens=4"]
SMALL += ["tracking.enabled=false"]
CONFIG = TASK.replace("vocab_size: 256", "vocab_size: 280").partition("data:")[0] + (
    "data: {corpus: corpus, context: 48, batch: 2, validation_sequences: 2}\n"
    "train: {steps: 1}\ncheckpoint: {every: 0}\nsample: {tokens: 4}\ntracking: {enabled: false}\nrun: {name: mine}\n"
)


@pytest.fixture
def run(request: pytest.FixtureRequest, place: Path) -> Path:
    """A run on a corpus in this tokenizer."""
    (place / "text.txt").write_text(SOURCES[request.param])
    more = {"vocab_size": 270} if request.param == "bpe" else {}
    prepare("text.txt", "corpus", tokenizer=request.param, validation=0.2, **more)
    (place / "config.yaml").write_text(CONFIG)
    assert main(["train", "config.yaml"]) == 0
    return place / "runs" / "mine"


def said(run: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(["generate", run, "--prompt", "ACG", "--tokens", "9", "--temperature", "3"]) == code
    output = capsys.readouterr()
    return output.err if code else output.out


@pytest.mark.parametrize("run", SOURCES, indirect=True)
def test_a_run_says_and_exports_text_without_its_corpus(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = open_corpus("corpus")
    before = said("mine", capsys)
    (place / "elsewhere").mkdir()
    shutil.copytree(run, place / "elsewhere" / "copy")
    (place / "corpus").rename(place / "away")
    assert said("elsewhere/copy", capsys) == before and before.startswith("ACG")

    assert main(["export", "elsewhere/copy", "out", "--layout", "mamba"]) == 0
    assert "after step 1 as mamba, and its tokenizer" in capsys.readouterr().out
    assert main(["export", "elsewhere/copy", "other", "--layout", "state-spaces"]) == 0
    ends = [json.loads((place / name / "config.json").read_text()).get("eos_token_id") for name in ("out", "other")]
    assert ends == [0, None], "where config.json is transformers'"
    text = (place / "text.txt").read_text()
    ids = corpus.tokenizer.encode(text).tolist()
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    assert theirs(text).input_ids == ids and theirs.eos_token_id == corpus.tokenizer.separator == 0
    assert theirs.decode(ids) == corpus.tokenizer.decode(ids)
    if corpus.tokenizer.name == "dna":
        (place / "out" / FILES[1]).rename(place / "away.json")
        theirs = transformers.AutoTokenizer.from_pretrained("out")
        assert theirs(text).input_ids != ids, "negative control: transformers takes the class that it knows for mamba"
        (place / "away.json").rename(place / "out" / FILES[1])

    assert main(["import", "out", "runs/back", *SMALL]) == 0
    assert said("back", capsys) == before, "the same weights, the same tokens"
    back = find_run("back")
    assert run_tokenizer(back, Experiment.resume(back).data).name == corpus.tokenizer.name


@pytest.mark.parametrize("run", ["bpe"], indirect=True)
def test_a_run_from_before_takes_its_corpus(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = said("mine", capsys)
    kept = [(run / name).read_text() for name in FILES]
    for name in FILES:
        (run / name).unlink()
    assert said("mine", capsys) == before
    assert main(["export", "mine", "out", "--layout", "mamba"]) == 0
    assert [(place / "out" / name).read_text() for name in FILES] == kept

    (place / "corpus").rename(place / "away")
    line = said("mine", capsys, code=2)
    assert line.startswith("longstride: ") and "corpus is not a prepared corpus" in line and line.count("\n") == 1
    assert main(["export", "mine", "bare", "--layout", "mamba"]) == 0
    assert "note: without a tokenizer.json: " in capsys.readouterr().err and not (place / "bare" / FILES[0]).exists()

    (place / "away").rename(place / "corpus")
    assert main(["resume", "mine", "train.steps=2"]) == 0
    assert [(run / name).read_text() for name in FILES] == kept, "kept from the next start"
    (run / FILES[0]).write_text("{")
    assert "runs/mine/tokenizer.json cannot be used: not a tokenizer.json" in said("mine", capsys, code=2)


@pytest.mark.parametrize("run", ["bpe"], indirect=True)
def test_fine_tuning_on_other_tokens_is_refused(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "mine", "out", "--layout", "mamba"]) == 0
    (place / "out" / FILES[1]).write_text('{"eos_token": "<|endoftext|>", "chat_template": "mine"}')
    prepare("text.txt", "bytes")
    capsys.readouterr()
    line = "has a tokenizer of its own and data.corpus={} is written in bytes: make one with `longstride prepare"
    assert main(["import", "out", "runs/tuned", "data.corpus=bytes"]) == 2
    error = capsys.readouterr().err
    assert f"the model in out {line.format(place / 'bytes')} SOURCE OUT --tokenizer out/tokenizer.json`" in error
    assert error.count("\n") == 1
    assert not (place / "runs" / "tuned").exists()
    assert main(["import", "out", "runs/tuned", *SMALL]) == 0
    assert "and its tokenizer" in capsys.readouterr().out
    assert main(["resume", "tuned"]) == 2
    error = capsys.readouterr().err
    assert line.format("python-source") in error and f"{place}/runs/tuned/tokenizer.json` and give" in error

    assert main(["resume", "tuned", "data.corpus=corpus"]) == 0
    files = kept_tokenizer(find_run("tuned"))
    assert files is not None and "chat_template" in files.config, "training leaves what came with the model"
    assert main(["import", "runs/tuned", "runs/child"]) == 0
    assert kept_tokenizer(find_run("child")) == files


def test_an_import_without_a_tokenizer_takes_that_of_the_corpus_it_is_trained_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "config.yaml").write_text(CONFIG.replace("corpus: corpus", "corpus: ecoli"))
    assert main(["train", "config.yaml"]) == 0
    assert main(["export", "mine", "out", "--layout", "mamba"]) == 0
    for name in FILES:
        (place / "out" / name).unlink()
    capsys.readouterr()
    assert main(["import", "out", "runs/bare", *SMALL]) == 0
    assert "and its tokenizer" not in capsys.readouterr().out and kept_tokenizer(find_run("bare")) is None
    assert main(["export", "bare", "unknown", "--layout", "mamba"]) == 0
    assert not (place / "unknown" / FILES[0]).exists(), "nobody has said what its ids mean"
    assert main(["resume", "bare", "data.corpus=ecoli", "sample.prompt=A", "sample.tokens=4"]) == 0
    assert kept_tokenizer(find_run("bare")) == TokenizerFiles.of(open_corpus("ecoli").tokenizer)


def test_prepare_says_why_it_reads_bases(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "genome.fa").write_text(">one\n" + "ACGTA\n" * 40)
    assert main(["prepare", "genome.fa", "bases"]) == 0
    assert "\ntokenizer dna (all sources are FASTA), vocabulary 6; " in capsys.readouterr().out
    assert main(["prepare", "genome.fa", "letters", "--tokenizer", "bytes"]) == 0
    assert "\ntokenizer bytes, vocabulary 256; " in capsys.readouterr().out
