"""A run's tokenizer in the run's directory, wherever that is."""

from __future__ import annotations

import fsspec
import pytest

from longstride.data import DnaTokenizer, TokenizerFiles
from longstride.data.subwords import train_bpe
from longstride.workers import ConfigError, RunDirectory
from longstride.workers.run_tokenizer import keep_tokenizer, kept_tokenizer
from tests.faults.proxy import FaultProxy

from ..faults.conftest import server as server
from ..faults.conftest import store as store


def test_it_is_kept_in_a_store(store: FaultProxy) -> None:
    run = RunDirectory.create("s3://bucket/runs", "mine", "workers: 1\n")
    assert kept_tokenizer(run) is None
    bpe, dna = TokenizerFiles.of(train_bpe(iter(["naïve café"] * 9), 280)), TokenizerFiles.of(DnaTokenizer())
    assert bpe is not None and dna is not None
    keep_tokenizer(run, bpe)
    assert kept_tokenizer(RunDirectory(run.url)) == bpe
    written = fsspec.filesystem("s3").info("bucket/runs/mine/tokenizer.json")["LastModified"]
    keep_tokenizer(run, TokenizerFiles(bpe.tokenizer, "{}"))
    assert kept_tokenizer(run) == bpe, "the same tokens: what came with them stays"
    assert fsspec.filesystem("s3").info("bucket/runs/mine/tokenizer.json")["LastModified"] == written
    keep_tokenizer(run, DnaTokenizer())
    assert kept_tokenizer(run) == dna
    run.storage.write_text("tokenizer.json", "{")
    with pytest.raises(
        ConfigError, match=r"s3://bucket/runs/mine/tokenizer\.json cannot be used: not a tokenizer\.json"
    ):
        kept_tokenizer(run)
