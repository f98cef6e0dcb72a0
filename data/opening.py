"""From what a config names to a corpus: one that ships with this package, a prepared one, or a mixture of these."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from .corpus import Corpus
from .embedded import EMBEDDED
from .errors import CorpusError
from .mixture import Mixture
from .shards import ShardedCorpus
from .tasks import TASKS


def open_corpus(
    source: str | Mapping[str, float],
    *,
    verify: Literal["size", "blocks", "checksum"] = "blocks",
    on_bad_shard: Literal["stop", "skip"] = "stop",
) -> Corpus:
    """Open a corpus.

    Args:
        source: "python-source" or "ecoli"; the path or fsspec URL of a folder that `prepare` made; or a mixture,
            {any of these: its weight}.
        verify, on_bad_shard: for prepared corpora, see `ShardedCorpus`.

    Raises CorpusError, in one line: there is no such corpus (the nearest name is given), it is damaged, or the corpora
    do not mix.
    """
    if not isinstance(source, str):
        if not source:
            example = "{python-source: 0.7, ...: 0.3}"
            raise CorpusError(f"the mixture is empty: give corpora and their weights, as in {example}")
        corpora = [open_corpus(name, verify=verify, on_bad_shard=on_bad_shard) for name in source]
        return Mixture([(corpus, float(weight)) for corpus, weight in zip(corpora, source.values(), strict=True)])
    if source in EMBEDDED:
        return EMBEDDED[source]()
    if "/" in source or Path(source).exists():
        return ShardedCorpus(source, verify=verify, on_bad_shard=on_bad_shard)
    if source in TASKS:
        raise CorpusError(f"{source!r} is a task and no text to mix: name it alone, as data.corpus={source}")
    near = difflib.get_close_matches(source, [*EMBEDDED, *TASKS], n=1, cutoff=0.4)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"take {', '.join(sorted([*EMBEDDED, *TASKS]))}, or the path of a prepared corpus"
    )
    raise CorpusError(f"unknown corpus {source!r}: {hint}")
