"""What is read: corpora, tokenizers, and the loader that hands every process its slice of every sequence.

Knows nothing of torch.distributed: it is told which rank of how many it serves.
"""

from .config import DataConfig
from .corpus import SPLITS, Corpus, CorpusError
from .loader import Batch, SequenceLoader, ValidationSet
from .mixture import Mixture
from .preparation import Prepared, Progress, prepare
from .shards import ShardedCorpus
from .subwords import SubwordTokenizer
from .tokenizers import ByteTokenizer, DnaTokenizer, Tokenizer

__all__ = [
    "SPLITS",
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "CorpusError",
    "DataConfig",
    "DnaTokenizer",
    "Mixture",
    "Prepared",
    "Progress",
    "SequenceLoader",
    "ShardedCorpus",
    "SubwordTokenizer",
    "Tokenizer",
    "ValidationSet",
    "prepare",
]
