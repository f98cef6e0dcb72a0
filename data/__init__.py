"""What is read: corpora, tokenizers, and the loader that hands every process its slice of every sequence.

Knows nothing of torch.distributed: it is told which rank of how many it serves.
"""

from .config import DataConfig
from .corpus import SPLITS, Corpus
from .errors import CorpusError, StoreUnavailable
from .loader import Batch, BatchLoader, HeldOut, SequenceLoader, ValidationSet
from .mixture import Mixture
from .opening import open_corpus
from .preparation import Prepared, Progress, prepare
from .schedule import Stage
from .shards import ShardedCorpus
from .subwords import SubwordTokenizer
from .task_loader import TaskLoader, TaskValidation
from .tasks import TASKS, Task, TasksConfig
from .tokenizer_files import TokenizerFiles
from .tokenizers import ByteTokenizer, DnaTokenizer, MuLawTokenizer, Tokenizer

__all__ = [
    "SPLITS",
    "TASKS",
    "Batch",
    "BatchLoader",
    "ByteTokenizer",
    "Corpus",
    "CorpusError",
    "DataConfig",
    "DnaTokenizer",
    "HeldOut",
    "Mixture",
    "MuLawTokenizer",
    "Prepared",
    "Progress",
    "SequenceLoader",
    "ShardedCorpus",
    "Stage",
    "StoreUnavailable",
    "SubwordTokenizer",
    "Task",
    "TaskLoader",
    "TaskValidation",
    "TasksConfig",
    "Tokenizer",
    "TokenizerFiles",
    "ValidationSet",
    "open_corpus",
    "prepare",
]
