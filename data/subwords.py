"""Subword tokenizers, through the `tokenizers` library: any tokenizer.json, and byte-level BPE trained here."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from .tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


class SubwordTokenizer(Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library.

    Text that happens to spell a special token is encoded as ordinary text; nothing is added, cut off or padded.

    Args: content: the JSON text. separator: id or text of the token that ends a document; by default the first that the
        vocabulary has of <|endoftext|>, <|end_of_text|>, </s>, <eos>, <|eos|>, [SEP]; -1 where none does.
    Raises ValueError: not a tokenizer, or no such separator in it.
    """

    def __init__(self, content: str, *, separator: int | str | None = None) -> None:
        try:
            self._engine = Engine.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {' '.join(str(error).split())}") from error
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True
        self.content = content
        self.name = f"tokenizer.json:{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        vocabulary = self.vocabulary()
        self.vocab_size = max(vocabulary.values()) + 1
        self.separator = _find_separator(vocabulary, separator)

    def vocabulary(self) -> dict[str, int]:
        """Of every token's text, its id."""
        return self._engine.get_vocab(with_added_tokens=True)

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        strings = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in texts]
        try:
            encodings = self._engine.encode_batch_fast(strings, add_special_tokens=False)
        except Exception as error:  # of a vocabulary that has no token for what it does not know
            raise ValueError(f"the tokenizer cannot encode it: {' '.join(str(error).split())}") from error
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        pieces: list[list[int]] = [[]]
        for token in tokens:
            if int(token) == self.separator:
                pieces.append([])
            else:
                pieces[-1].append(int(token))
        return "\n".join(self._engine.decode(piece, skip_special_tokens=False) for piece in pieces)


def train_bpe(texts: Iterator[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE with every digit a token of its own; id 0 is <|endoftext|>.

    Raises ValueError: fewer than 257 ids, which do not hold the bytes and the separator.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small for byte-level BPE: take at least 257")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(texts, trainer)
    return SubwordTokenizer(engine.to_str(), separator=END_OF_TEXT)


def _find_separator(vocabulary: dict[str, int], wanted: int | str | None) -> int:
    if isinstance(wanted, int):
        if wanted != -1 and wanted not in vocabulary.values():
            raise ValueError(f"separator {wanted} is not an id of the tokenizer")
        return wanted
    for text in (wanted,) if wanted is not None else SEPARATORS:
        if text in vocabulary:
            return vocabulary[text]
    missing = repr(wanted) if wanted is not None else "of the usual names"
    raise ValueError(f"the tokenizer has no end-of-document token {missing}: give the separator's text")
