"""A small corpus, prepared, and ways to look at one."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from longstride.data import prepare
from longstride.data.blocks import block_checksums

TEXTS = [f"Document {number} says {number * number}.\n" * (number % 5 + 1) for number in range(200)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(TEXTS)))
    return str(path)


@pytest.fixture
def prepared(jsonl, tmp_path):
    out = str(tmp_path / "out")
    prepare(jsonl, out, part_bytes=2000)
    return out


def stream(corpus, split):
    return corpus.read(split, 0, corpus.num_tokens(split))


def with_blocks_of(folder, size):
    """Another size of blocks for a prepared corpus; None: no blocks, as corpora had none before."""
    index = Path(folder) / "index.json"
    tree = json.loads(index.read_text())
    tree["block_bytes"] = size
    for shard in itertools.chain(*tree["splits"].values()):
        blocks = Path(folder) / f"{shard['name']}.blocks"
        if size is None:
            del shard["blocks_sha256"]
            blocks.unlink()
        else:
            blocks.write_bytes(block_checksums((Path(folder) / f"{shard['name']}.tokens").read_bytes(), size))
            shard["blocks_sha256"] = hashlib.sha256(blocks.read_bytes()).hexdigest()
    if size is None:
        del tree["block_bytes"]
    index.write_text(json.dumps(tree))
