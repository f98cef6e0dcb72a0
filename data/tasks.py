"""Synthetic tasks: corpora whose sequences are made up when they are asked for, each with the targets that count.

A sequence is one example and one document. Example number n of a split is a function of (split, seed, n, length): every
process makes the rows of its data rank and keeps its slice of them; nothing is stored. The held-out examples are the
same for every seed.

Ids of the vocabularies: "induction-heads" and "associative-recall" reserve the last two, as H3's code (safari) does:
"." which never occurs in these examples, and the trigger "=>".
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from .corpus import SPLITS, Corpus
from .draws import Draws
from .errors import CorpusError
from .loader import IGNORED
from .tokenizers import IdTokenizer

# Examples of a split whose number is not limited: as many as one could read.
ENDLESS = 1 << 40
_RESERVED = 2


class TaskOptions(BaseModel):
    """What all tasks have.

    Attributes:
        vocabulary: number of token ids, special ones included.
        examples: size of the training set, read in epochs; 0: new examples without end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary: int = Field(default=16, ge=4)
    examples: int = Field(default=0, ge=0)


class RecallOptions(TaskOptions):
    """Tasks that ask for something seen before.

    Attributes:
        score: the training targets that count: the answer, or every next token (as H3's code trains).
    """

    score: Literal["answer", "all"] = "answer"


class AssociativeRecallOptions(RecallOptions):
    vocabulary: int = Field(default=20, ge=4)
    score: Literal["answer", "all"] = "all"


class SelectiveCopyingOptions(TaskOptions):
    """Copying tokens, and not the noise between them.

    Attributes:
        tokens: how many are to be copied.
    """

    tokens: int = Field(default=16, ge=1)


class MqarOptions(TaskOptions):
    """Multi-query associative recall.

    Attributes:
        pairs: of keys and values.
        power: of the gaps between a pair and its query; 1 makes them uniform.
        random_fill: random tokens between the queries instead of token 0.
    """

    vocabulary: int = Field(default=8192, ge=4)
    pairs: int = Field(default=8, ge=1)
    power: float = Field(default=0.01, gt=0)
    random_fill: bool = False


class TasksConfig(BaseModel):
    """Options of each task; those of `data.corpus` are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    induction_heads: RecallOptions = RecallOptions()
    selective_copying: SelectiveCopyingOptions = SelectiveCopyingOptions()
    associative_recall: AssociativeRecallOptions = AssociativeRecallOptions()
    mqar: MqarOptions = MqarOptions()

    def open(self, name: str, context: int) -> "Task":
        """The task of this name, with examples of `context` tokens. CorpusError: it has none of that length."""
        return TASKS[name](getattr(self, name.replace("-", "_")), context)


@dataclass(frozen=True)
class Example:
    """int64, (length,) each: the tokens, and what should follow them; -100 where that is not asked for."""

    tokens: np.ndarray
    targets: np.ndarray


class Task(Corpus, ABC):
    """A task with examples of `context` tokens; as a corpus, a stream of them."""

    def __init__(self, options: TaskOptions, context: int) -> None:
        self.common, self.context = options, context
        self.tokenizer = IdTokenizer(options.vocabulary)
        if problem := self.misfit(context):
            raise CorpusError(f"data.corpus {self.name} has no examples of data.context {context}: {problem}")

    @abstractmethod
    def misfit(self, length: int) -> str | None:
        """Why there are no examples of this length, and what to take; None where there are."""

    @abstractmethod
    def make(self, draws: Draws, length: int) -> Example:
        """An example whose targets are its answers."""

    @property
    def num_answers(self) -> int:
        """Targets of an example that `make` does not leave out."""
        return 1

    @property
    def scores_all(self) -> bool:
        """Whether training asks for every next token and not for the answers alone."""
        return isinstance(self.common, RecallOptions) and self.common.score == "all"

    def num_targets(self, split: str) -> int:
        """Targets of one example that count."""
        return self.context if self.scores_all and split == "train" else self.num_answers

    def example(self, split: str, number: int, seed: int = 0) -> Example:
        """Example `number` of a split; held-out ones do not depend on the seed."""
        options = self.common.model_dump_json(exclude={"examples", "score"})
        key = (self.name, options, split, seed if split == "train" else 0, self.context, number)
        example = self.make(Draws(*key), self.context)
        if not (self.scores_all and split == "train"):
            return example
        following = np.append(example.tokens[1:], example.targets[-1])
        return Example(example.tokens, following)

    def num_examples(self, split: str) -> int:
        return self.common.examples or ENDLESS if split == "train" else ENDLESS

    def num_tokens(self, split: str) -> int:
        return self.num_examples(split) * self.context

    def document_starts(self, split: str, start: int, stop: int) -> np.ndarray:
        return np.arange(-(-start // self.context) * self.context, stop, self.context, dtype=np.int64)

    def read(self, split: str, start: int, stop: int) -> np.ndarray:
        first, last = start // self.context, -(-stop // self.context)
        tokens = [self.example(split, number).tokens for number in range(first, last)]
        offset = first * self.context
        return np.concatenate([np.zeros(0, np.int64), *tokens])[start - offset : stop - offset]

    def fingerprint(self) -> str:
        text = f"{self.name} {self.common.model_dump_json()} {SPLITS}"
        return hashlib.sha256(text.encode()).hexdigest()


class InductionHeads(Task):
    """Random tokens with one trigger among them, and the trigger again at the end: what followed it the first time?

    H3 (arXiv 2212.14052, Table 1; safari, generate_induction_head with one trigger and one token to copy), and with
    vocabulary 16 and a new batch every step Mamba's (arXiv 2312.00752, section 4.1.2).
    """

    name = "induction-heads"

    def __init__(self, options: RecallOptions, context: int) -> None:
        self.options = options
        super().__init__(options, context)

    def misfit(self, length: int) -> str | None:
        return None if length >= 4 else "take 4 or more"

    def make(self, draws: Draws, length: int) -> Example:
        vocabulary = self.options.vocabulary
        trigger = vocabulary - 1
        tokens = np.append(draws.integers(vocabulary - _RESERVED, length - 1), trigger)
        place = draws.integer(length - 3)  # the token to copy is never the last before the end
        tokens[place] = trigger
        return Example(tokens, _only_last(length, int(tokens[place + 1])))


class AssociativeRecall(Task):
    """Pairs of a key and its value, keys again and again; then the trigger and a key that has occurred: which value?

    H3's and Hyena's (arXiv 2212.14052, 2302.10866; safari, generate_assoc_recall with allow_dot=False): the first half
    of the ordinary tokens are keys, the second half values, every key has one value in a sequence, drawn anew for each.
    """

    name = "associative-recall"

    def __init__(self, options: AssociativeRecallOptions, context: int) -> None:
        self.options = options
        super().__init__(options, context)

    def misfit(self, length: int) -> str | None:
        return None if length >= 4 and length % 2 == 0 else "take an even length, 4 or more"

    def make(self, draws: Draws, length: int) -> Example:
        ordinary = self.options.vocabulary - _RESERVED
        num_keys = ordinary // 2
        value_of = num_keys + draws.integers(ordinary - num_keys, num_keys)
        keys = draws.integers(num_keys, (length - 2) // 2)
        present = np.unique(keys)
        query = present[draws.integer(len(present))]
        pairs = np.stack([keys, value_of[keys]], axis=1).ravel()
        tokens = np.append(pairs, [self.options.vocabulary - 1, query])
        return Example(tokens, _only_last(length, int(value_of[query])))


class SelectiveCopying(Task):
    """A few tokens at random places among noise (id 0), then as many markers (the last id): repeat them in order.

    Mamba (arXiv 2312.00752, section 4.1.1); the generator is S4's `copying` with variable=True (state-spaces/s4): with
    M tokens, a sequence is context - M places, M of them filled with ids 1 to vocabulary - 2, and M markers.
    """

    name = "selective-copying"

    def __init__(self, options: SelectiveCopyingOptions, context: int) -> None:
        self.options = options
        super().__init__(options, context)

    @property
    def num_answers(self) -> int:
        return self.options.tokens

    def misfit(self, length: int) -> str | None:
        least = 2 * self.options.tokens
        return None if length >= least else f"{self.options.tokens} tokens and their markers need {least} or more"

    def make(self, draws: Draws, length: int) -> Example:
        count = self.options.tokens
        content = 1 + draws.integers(self.options.vocabulary - 2, count)
        tokens = np.zeros(length, dtype=np.int64)
        tokens[np.sort(draws.subset(length - count, count))] = content
        tokens[-count:] = self.options.vocabulary - 1
        targets = np.full(length, IGNORED, dtype=np.int64)
        targets[-count:] = content
        return Example(tokens, targets)


class Mqar(Task):
    """Multi-query associative recall: pairs of different keys and values, then every key once more: its value?

    Zoology (arXiv 2312.04927; HazyResearch/zoology, multiquery_ar): keys are ids 1 to vocabulary / 2 - 1, values the
    rest; queries stand at even distances behind the pairs, gap g drawn in proportion to g ** (power - 1).
    """

    name = "mqar"

    def __init__(self, options: MqarOptions, context: int) -> None:
        self.options = options
        super().__init__(options, context)

    @property
    def num_answers(self) -> int:
        return self.options.pairs

    def misfit(self, length: int) -> str | None:
        pairs, vocabulary = self.options.pairs, self.options.vocabulary
        if vocabulary // 2 - 1 < pairs:
            return f"{pairs} pairs need {pairs} keys; set data.tasks.mqar.vocabulary={2 * pairs + 2}"
        if length % 2 or length < 4 * pairs:
            return f"{pairs} pairs and their queries need an even number of tokens, {4 * pairs} or more"
        return None

    def make(self, draws: Draws, length: int) -> Example:
        options = self.options
        half, begin = options.vocabulary // 2, 2 * options.pairs
        keys = 1 + draws.subset(half - 1, options.pairs)
        values = half + draws.subset(options.vocabulary - half, options.pairs)
        weights = np.arange(1, (length - begin) // 2 + 1, dtype=np.float64) ** (options.power - 1)
        places = begin + 2 * draws.weighted_subset(weights, options.pairs)
        tokens = np.zeros(length, dtype=np.int64)
        if options.random_fill:
            tokens[begin:] = draws.integers(options.vocabulary, length - begin)
        tokens[:begin] = np.stack([keys, values], axis=1).ravel()
        tokens[places] = keys
        targets = np.full(length, IGNORED, dtype=np.int64)
        targets[places] = values
        return Example(tokens, targets)


TASKS: dict[str, type[Task]] = {task.name: task for task in (InductionHeads, SelectiveCopying, AssociativeRecall, Mqar)}


def _only_last(length: int, answer: int) -> np.ndarray:
    targets = np.full(length, IGNORED, dtype=np.int64)
    targets[-1] = answer
    return targets
